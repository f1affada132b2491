"""Conversations are learnt in their answers alone, packed without seeing each other, taken up again
exactly, and exported with their template."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chats import make_tools
from dray.corpus.packing import pack
from dray.corpus.prepare import prepare
from dray.corpus.shards import make_batch, stored_columns
from dray.corpus.tools import Tools
from dray.errors import CorpusError, SpecError
from dray.models.build import build_model, documents_apart
from dray.release.evaluate import evaluate
from dray.release.export import export
from dray.release.generate import generate
from dray.release.predict import Counts, predict
from dray.runs import Run
from dray.spec import Spec, make_spec
from dray.tasks.instruction import Instruction
from dray.tasks.rows import IGNORED
from dray.train import train_locally
from tiny import tiny_tree

LANDS = {"Rome": "Italy", "Lyon": "France", "Bonn": "Germany", "Oslo": "Norway", "Kyoto": "Japan"}


def asked(town: str) -> str:
    return f"where is {town}?"


def told(town: str) -> str:
    return f"in {LANDS[town]}"


def conversation(drawn: random.Random) -> dict[str, Any]:
    """One to three questions, in one of three forms."""
    towns = [drawn.choice(list(LANDS)) for _ in range(drawn.randint(1, 3))]
    pairs = [(asked(town), told(town)) for town in towns]
    form = drawn.randrange(3)
    if form == 0:
        (*history, (question, answer)) = pairs
        return {"instruction": question, "input": "", "output": answer, "history": history}
    if form == 1:
        turns = [
            {"from": speaker, "value": words}
            for pair in pairs
            for speaker, words in zip(("human", "gpt"), pair, strict=True)
        ]
        return {"conversations": turns}
    said = [
        {"role": role, "content": words}
        for pair in pairs
        for role, words in zip(("user", "assistant"), pair, strict=True)
    ]
    return {"messages": [{"role": "system", "content": f"no {drawn.random()}"}, *said]}


def write_conversations(folder: Path, num: int = 400) -> None:
    folder.mkdir()
    drawn = random.Random(0)
    lines = [json.dumps(conversation(drawn)) for _ in range(num)]
    lines.insert(7, json.dumps({"text": "none"}))
    long = " ".join(str(drawn.random()) for _ in range(40))
    lines.insert(9, json.dumps({"instruction": long, "output": "no"}))
    (folder / "talks.jsonl").write_text("\n".join(lines), encoding="utf-8")


def make(folder: Path, steps: int, **sections: Any) -> Spec:
    tree = tiny_tree(
        folder,
        name="talks",
        task={"name": "instruction", "template": "chatml", "answer_tokens": 12},
        data={
            "train": {"path": f"{folder}/talks.jsonl"},
            "validation": {"share": 0.2},
            "sequence_tokens": 128,
            "cleaning": {"deduplicate": "none"},
        },
        tokenizer={"train": "byte_bpe", "vocab_size": 400},
        batch={"global_rows": 16, "micro_rows": 8},
        optimizer={"learning_rate": 5e-3},
        validation={"every_steps": 60, "max_rows": None},
        checkpoint={"every_steps": 120},
        resources={"workers": 1},
    )
    tree["duration"] = {"steps": steps}
    return make_spec(tree | sections)


def test_answers_are_learnt_written_and_exported(tmp_path: Path, local_ray: None) -> None:
    folder, storage = tmp_path / "in", str(tmp_path / "runs")
    write_conversations(folder)
    spec = make(folder, 240)
    corpus = prepare(spec, storage)
    assert corpus.manifest.dropped["no conversation"] == 1
    assert corpus.manifest.dropped["longer than a row"] == 1
    train_locally(spec, storage=storage, run_name="talks")
    measured = Run.open(storage, "talks").validations()[-1]
    assert measured["perplexity"] < 1.1
    exact = evaluate(storage, "talks", thorough=True)
    # Each conversation by itself loses what it loses between its neighbours in a row.
    assert exact["loss"] == pytest.approx(measured["loss"], rel=1e-4, abs=1e-6)
    assert exact["num_targets"] == measured["num_targets"]
    assert exact["exact"] > 0.95
    texts = generate(storage, "talks", [asked(town) for town in LANDS], temperature=0)
    assert texts == [told(town) for town in LANDS]
    with pytest.raises(SpecError, match="a special token in what is said"):
        generate(storage, "talks", ["<|im_start|>assistant"])
    with pytest.raises(SpecError, match=r"the model takes 128; instruction answers whole prompts"):
        generate(storage, "talks", ["where? " * 80])
    lines = [
        {"messages": [{"role": "user", "content": asked("Oslo")}]},
        {"instruction": asked("Rome"), "output": "nowhere"},
        {"text": "none"},
    ]
    (folder / "new.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    counts = Counts()
    found = list(predict(storage, "talks", [str(folder / "new.jsonl")], counts=counts))
    assert found == [
        {**lines[0], "prediction": told("Oslo")},
        {**lines[1], "prediction": told("Rome")},
        {**lines[2], "error": "no conversation"},
    ]
    assert (counts.num_predicted, counts.num_bad) == (2, 1)
    check_export(storage, tmp_path / "out", corpus.folder)


def check_export(storage: str, folder: Path, corpus: str) -> None:
    """transformers asks by the same ids, and writes the same."""
    export(storage, "talks", str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    run = Run.open(storage, "talks")
    from dray.release.trained import open_trained

    trained = open_trained(storage, run.name)
    for town in LANDS:
        messages = [{"role": "user", "content": asked(town)}]
        given = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert given == trained.task.prompt(asked(town), trained.tools)
        out = model.generate(torch.tensor([given]), max_new_tokens=12, do_sample=False)
        assert tokenizer.decode(out[0, len(given) :], skip_special_tokens=True) == told(town)


def test_a_tokeniser_without_a_template_is_refused(tmp_path: Path, local_ray: None) -> None:
    write_conversations(tmp_path / "in", 20)
    spec = make(tmp_path / "in", 3, task={"name": "instruction"})
    with pytest.raises(CorpusError, match=r"no chat template.*task\.template"):
        prepare(spec, str(tmp_path / "runs"))


def rows_of(task: Instruction, tools: Tools, talks: list[str], width: int) -> pa.Table:
    """Conversations as a corpus packs them, all into one row."""
    records = [json.dumps({"instruction": "what?", "output": talk}) for talk in talks]
    encoded = task.encode(pa.array(records, pa.large_string()), None, tools)
    aligned = {column.name: (encoded.columns[column.name], column.pad) for column in task.columns}
    rows = pack(encoded.tokens, encoded.lengths, width, 1, aligned)
    assert len(rows.tokens) == 1
    values: Any = {"input_ids": rows.tokens, "num_tokens": rows.num_tokens, **rows.aligned}
    return pa.Table.from_batches([make_batch(stored_columns(task, width, tools.dtype), values)])


def test_a_conversations_loss_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    tools, width = make_tools(tmp_path, row_tokens=160), 160
    task = Instruction(Instruction.Settings(template="chatml"))
    spec = make(tmp_path, 3)
    torch.manual_seed(0)
    model = build_model(spec, vocab_size=400, pad_token_id=1, eos_token_id=0).eval()

    def own_losses(talks: list[str], one: str) -> list[float]:
        table = rows_of(task, tools, talks, width)
        batch = task.collate(table)
        assert batch["position_ids"].max() < 60
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        every = torch.nn.functional.cross_entropy(
            logits[0], batch["labels"][0], ignore_index=IGNORED, reduction="none"
        )
        text = tools.encode(pa.array([one], pa.large_string()))[0].tolist()
        ids = batch["input_ids"][0].tolist()
        (at,) = [i for i in range(len(ids)) if ids[i : i + len(text)] == text]
        found = every[at - 1 : at + len(text)]
        assert (batch["labels"][0, at - 1 : at + len(text)] != IGNORED).all()
        return [float(loss) for loss in found]

    one, others = "Paris is the capital", ["books", "who wrote?", "answered answered"]
    for inside in (documents_apart(), torch.no_grad()):
        with inside:
            alone = own_losses([one], one)
            assert own_losses([one, *others], one) == pytest.approx(alone, abs=1e-5)
            assert own_losses([*others, one], one) == pytest.approx(alone, abs=1e-5)
