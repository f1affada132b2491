"""The arm beside dray in `bench.finetuning`: an encoder and Hugging Face's Trainer, one rank of
torchrun.

The batches are grouped by length, as dray's corpus groups its rows. Prints the seconds of
`trainer.train()` as JSON.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import tempfile
import time

import torch
import transformers


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True, help="gzipped lines of text, tab, label")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True, help="of a rank and a step")
    parser.add_argument("--tokens", type=int, required=True, help="at most, of a row")
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    with gzip.open(arguments.train, "rt", encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [
        dict(tokenizer(text, truncation=True, max_length=arguments.tokens), labels=int(label))
        for text, label in lines
    ]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        arguments.model, num_labels=2
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model=model,
            train_dataset=rows,
            data_collator=transformers.DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
            args=transformers.TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=arguments.rows,
                max_steps=arguments.steps,
                learning_rate=5e-5,
                lr_scheduler_type="constant",
                use_cpu=True,
                bf16=arguments.bf16,
                report_to=[],
                save_strategy="no",
                logging_steps=20,
                disable_tqdm=True,
                train_sampling_strategy="group_by_length",
            ),
        )
        begun = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - begun
    if trainer.is_world_process_zero():
        print(json.dumps({"seconds_of_steps": seconds}))


if __name__ == "__main__":
    main()
