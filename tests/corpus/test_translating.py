"""Texts there and back: what two models write is what `dray predict` says that they write, once,
when the corpus is prepared."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from dray.corpus.prepare import Corpus, find, prepare
from dray.corpus.rewriting import Rewriter
from dray.corpus.stream import RowStream
from dray.corpus.tokenizing import load_decoder
from dray.errors import SpecError
from dray.release.export import export
from dray.release.predict import predict
from dray.spec import Spec, make_spec
from dray.train import train_locally
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
WORDS = ("red", "green", "old", "new", "cold", "warm")
T5 = {"architecture": "t5", "hidden_size": 32, "num_layers": 1, "num_heads": 2}
LLAMA = {"architecture": "llama", "hidden_size": 32, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled texts, and two runs that answer texts: an encoder with a decoder, and a decoder
    alone."""
    place = tmp_path_factory.mktemp("translated")
    drawn = random.Random(0)
    lines = []
    for _ in range(40):
        text = " ".join(drawn.choice(WORDS) for _ in range(drawn.randint(2, 5)))
        answer = "warm days" if len(text.split()) < 4 else "cold nights"
        lines.append(json.dumps({"text": text, "answer": answer, "label": text.split()[0]}))
    (place / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, alone, model in (("there", False, T5), ("back", True, LLAMA)):
        spec = make_spec(
            tiny_tree(
                place,
                name=name,
                task={"name": "seq2seq", "decoder_only": alone, "beams": 1, "answer_tokens": 8},
                data={
                    "train": {"path": f"{place}/a.jsonl"},
                    "validation": None,
                    "sequence_tokens": 48,
                    "cleaning": {"deduplicate": "none"},
                },
                tokenizer={"train": "byte_bpe", "vocab_size": 300},
                model=model,
                duration={"steps": 60},
                optimizer={"learning_rate": 1e-2},
                resources={"workers": 1},
            )
        )
        prepare(spec, str(place / "runs"))
        train_locally(spec, storage=str(place / "runs"), run_name=name)
    return place


def spec_of(folder: Path, there: dict[str, Any], back: dict[str, Any]) -> Spec:
    models = {"there": there, "back": back, "max_tokens": 8}
    return make_spec(
        tiny_tree(
            folder,
            task="sequence_classification",
            data={
                "train": {"path": f"{folder}/a.jsonl", "label": "label"},
                "validation": {"share": 0.2},
                "sequence_tokens": 32,
                "cleaning": {"deduplicate": "none"},
            },
            augmentation={
                "kinds": ["back_translation"], "share": 1.0, "back_translation": models,
            },
        )
    )  # fmt: skip


def read(spec: Spec, corpus: Corpus) -> dict[str, str]:
    """Texts as they are learnt, by the texts that they are made of."""
    assert spec.augmentation is not None
    rows = corpus.manifest.train.num_rows
    settings: dict[str, Any] = {
        "folder": corpus.folder, "key": corpus.manifest.key, "seed": 0, "global_rows": rows,
        "num_ranks": 1, "rows_per_rank": rows, "micro_rows": 1, "start_step": 0, "num_steps": 1,
    }  # fmt: skip
    plain = RowStream(**settings)
    other = RowStream(**settings, rewriter=Rewriter(spec.augmentation, spec.task, 0))
    decoder = load_decoder(f"{corpus.folder}/tokenizer")
    found = {}
    load = next(plain.loads())
    blocks = (dict(one.cut(one.read_block(load, 0), load)) for one in (plain, other))
    (plainly, reworded) = (next(iter(block.values())).to_pylist() for block in blocks)
    for before, after in zip(plainly, reworded, strict=True):
        ids = after["input_ids"][: after["num_tokens"]]
        found[bytes(before["given_text"]).decode()] = decoder.decode(ids)
    return found


def answers(folder: Path, name: str, texts: list[str], tmp_path: Path) -> list[str]:
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return [one["prediction"] for one in predict(str(folder / "runs"), name, [str(path)])]


def test_what_is_learnt_is_what_both_models_write(folder: Path, tmp_path: Path) -> None:
    spec = spec_of(folder, {"run": "there"}, {"run": "back"})
    storage = str(folder / "runs")
    corpus = prepare(spec, storage)
    assert find(spec, storage) == corpus
    found = read(spec, corpus)
    texts = list(found)
    middle = answers(folder, "there", texts, tmp_path)
    expected = answers(folder, "back", middle, tmp_path)
    kept = [
        text if not (one.strip() and other.strip()) else other
        for text, one, other in zip(texts, middle, expected, strict=True)
    ]
    assert [text.strip() for text in found.values()] == [text.strip() for text in kept]
    assert any(text.strip() != own.strip() for text, own in found.items())
    assert corpus.manifest.num_untranslated == 0


def test_a_folder_translates_as_its_run_does(folder: Path) -> None:
    export(str(folder / "runs"), "there", str(folder / "exported"))
    by_run = spec_of(folder, {"run": "there"}, {"run": "back"})
    by_folder = spec_of(folder, {"path": str(folder / "exported")}, {"run": "back"})
    storage = str(folder / "runs")
    assert read(by_run, prepare(by_run, storage)) == read(by_folder, prepare(by_folder, storage))


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"run": "nobody"}, r"augmentation\.back_translation\.there\.run = nobody"),
        ({"path": "/nowhere"}, "nowhere"),
    ],
)
def test_what_is_no_translator_is_refused(
    folder: Path, there: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        prepare(spec_of(folder, there, {"run": "back"}), str(folder / "runs"))
