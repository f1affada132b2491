"""An exported folder under plain transformers gives the ids and the metrics that training and
`evaluate` gave."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import dray
from dray.corpus.prepare import prepare
from dray.corpus.stream import read_rows
from dray.release.evaluate import evaluate
from dray.release.export import export
from dray.release.generate import generate
from dray.release.trained import Trained, load_trained
from dray.train.driver import train_locally

pytestmark = pytest.mark.usefixtures("local_ray")
WORDS = ("the play was a tale of two towns and their river in winter now café naïve").split()  # noqa: SIM905
GOOD, BAD = ("good", "great", "fine"), ("bad", "awful", "poor")


def make_text(number: int) -> str:
    rng = random.Random(number)
    words = rng.choices(WORDS, k=rng.randint(1, 30))  # some are longer than a row
    words.insert(rng.randint(0, len(words)), rng.choice(BAD if number % 2 else GOOD))
    text = " ".join([*words, str(number)])
    # What is not in normal form, and what looks like special tokens, must be tokenised alike too.
    return text + (" cafe\u0301", " [SEP] x", "<|endoftext|>", "")[number % 4]


def write_rows(path: Path, numbers: range) -> list[dict[str, str]]:
    rows = [{"text": make_text(i), "label": ("pos", "neg")[i % 2]} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def make_wordpiece(folder: Path, texts: list[str]) -> None:
    """BERT's kind: lower case, no byte is sure to have a token, [CLS] and [SEP] around a text,
    padded on the left."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False),
    )
    _surround(tokenizer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        padding_side="left",
        model_max_length=7,
    ).save_pretrained(folder)


def make_byte_level(folder: Path, texts: list[str]) -> None:
    """ModernBERT's kind: bytes, with [CLS] and [SEP] around a text; some tokens stand in the
    configuration alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["[PAD]", "[CLS]", "[SEP]"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    _surround(tokenizer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    extra = {
        "content": "<|extra|>",
        "special": False,
        "normalized": False,
        "lstrip": False,
        "rstrip": False,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "pad_token": "[PAD]",
                "sep_token": "[SEP]",
                "cls_token": "[CLS]",
                "added_tokens_decoder": {str(tokenizer.get_vocab_size()): extra},
                "truncation_side": "left",
            }
        )
    )


def _surround(tokenizer: Any) -> None:
    from tokenizers import processors

    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )


TOKENIZERS: dict[str, Callable[[Path, list[str]], None] | None] = {
    "bpe": None,
    "wordpiece": make_wordpiece,
    "byte_level": make_byte_level,
}


@dataclass
class Exported:
    trained: Trained
    evaluated: dict[str, Any]
    model: Any
    tokenizer: Any
    held_out: list[dict[str, str]]
    said: list[str]
    """What `export` had to say."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


def exported(folder: Path, architecture: str, task: str, tokenizer: str) -> Exported:
    """A model trained for three steps, exported, and loaded by transformers' own classes."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    rows = write_rows(folder / "train.jsonl", range(160))
    held_out = write_rows(folder / "held.jsonl", range(1000, 1024))
    make = TOKENIZERS[tokenizer]
    if make is not None and not (folder / tokenizer).exists():
        make(folder / tokenizer, [row["text"] for row in rows])
    columns = {"label": "label"} if task == "sequence_classification" else {}
    spec = dray.make_spec(
        {
            "name": f"{architecture}-{task[:6]}",
            "task": task,
            "data": {
                "train": {"path": str(folder / "train.jsonl"), **columns},
                "validation": {"path": str(folder / "held.jsonl"), **columns},
                "sequence_tokens": 24,
            },
            "tokenizer": {"path": str(folder / tokenizer)}
            if make
            else {"train": "byte_bpe", "vocab_size": 400},
            "model": {
                "architecture": architecture,
                "hidden_size": 32,
                "num_layers": 1,
                "num_heads": 2,
            },
            "batch": {"global_rows": 8, "micro_rows": 4},
            "optimizer": {"learning_rate": 1e-2},
            "duration": {"steps": 3},
            "precision": "fp32",
            "zero": {"stage": 0},
            "engine": {"compile": False},
        }
    )
    storage, target = str(folder / "runs"), folder / spec.name
    corpus = prepare(spec, storage)
    train_locally(spec, storage=storage, corpus=corpus)
    said: list[str] = []
    export(storage, spec.name, str(target), say=said.append)
    kind = AutoModelForSequenceClassification if columns else AutoModelForCausalLM
    return Exported(
        load_trained(storage, spec.name),
        evaluate(storage, spec.name),
        kind.from_pretrained(target).eval(),
        AutoTokenizer.from_pretrained(target),
        held_out,
        said,
    )


def corpus_rows(trained: Trained) -> list[dict[str, Any]]:
    """The validation rows, each with its real tokens alone."""
    import numpy as np

    split = trained.manifest.validation
    assert split is not None
    table = read_rows(trained.corpus, trained.manifest, split, np.arange(split.num_rows))
    rows: list[dict[str, Any]] = table.to_pylist()
    return [row | {"input_ids": row["input_ids"][: row["num_tokens"]]} for row in rows]


@pytest.mark.parametrize(
    ("architecture", "tokenizer"),
    [("llama", "bpe"), ("gpt2", "bpe"), ("bert", "wordpiece"), ("modernbert", "byte_level")],
)
def test_a_classifier(folder: Path, architecture: str, tokenizer: str) -> None:
    it = exported(folder, architecture, "sequence_classification", tokenizer)
    assert it.said == []
    batch = it.tokenizer(
        [row["text"] for row in it.held_out], truncation=True, padding=True, return_tensors="pt"
    )
    ids = [
        row[mask.bool()].tolist()
        for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    label_ids = torch.tensor([it.model.config.label2id[row["label"]] for row in it.held_out])
    ours = sorted((row["label"], row["input_ids"]) for row in corpus_rows(it.trained))
    assert sorted(zip(label_ids.tolist(), ids, strict=True)) == ours
    assert any(len(found) == 24 for found in ids)
    with torch.no_grad():
        logits = it.model(**batch).logits
    loss = float(torch.nn.functional.cross_entropy(logits, label_ids))
    assert it.evaluated["loss"] == pytest.approx(loss, abs=1e-5)
    assert it.evaluated["accuracy"] == pytest.approx(
        float((logits.argmax(-1) == label_ids).float().mean()), abs=1e-6
    )


@pytest.mark.parametrize(
    ("architecture", "tokenizer"), [("llama", "bpe"), ("gpt2", "bpe"), ("bert", "wordpiece")]
)
def test_a_language_model(folder: Path, architecture: str, tokenizer: str) -> None:
    it = exported(folder, architecture, "causal_lm", tokenizer)
    assert it.said == []
    end = it.trained.manifest.eos_token_id
    theirs = [[*it.tokenizer(row["text"]).input_ids, end] for row in it.held_out]
    rows = corpus_rows(it.trained)
    ours = [token for row in rows for token in row["input_ids"]]
    assert len(ours) == sum(map(len, theirs)) == it.trained.manifest.validation.num_tokens  # type: ignore[union-attr]
    assert (
        sum(any(_holds(row["input_ids"], found) for row in rows) for found in theirs)
        > len(theirs) / 3
    )
    losses, count = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                losses += float(it.model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert it.evaluated["loss"] == pytest.approx(losses / count, abs=1e-5)
    prompt = "the play was"
    given = it.tokenizer(prompt, return_tensors="pt")
    out = it.model.generate(
        **given, do_sample=False, max_new_tokens=6, eos_token_id=end, pad_token_id=end
    )
    new = it.tokenizer.decode(out[0, given.input_ids.shape[1] :], skip_special_tokens=True)
    storage, name = str(folder / "runs"), it.trained.run.name
    assert generate(storage, name, [prompt], temperature=0, max_tokens=6) == [new]


def test_where_transformers_builds_its_own_splitting_it_is_said(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    it = exported(folder, "qwen2", "causal_lm", "bpe")
    text = "x = 1234567\r\n\r\n  'll"
    if it.tokenizer(text).input_ids == it.trained.encode(text):
        assert it.said == []
        return
    assert len(it.said) == 1
    assert "PreTrainedTokenizerFast" in it.said[0]
    plain = PreTrainedTokenizerFast.from_pretrained(folder / it.trained.run.name)
    assert plain(text).input_ids == it.trained.encode(text)


def _holds(row: list[int], document: list[int]) -> bool:
    width = len(document)
    return any(row[at : at + width] == document for at in range(len(row) - width + 1))
