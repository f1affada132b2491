"""A document is found in every corpus and run that has it, and in none that has not."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dray.cli import main
from dray.corpus.cleaning import digest_of
from dray.corpus.manifest import load_run_manifest
from dray.corpus.prepare import prepare
from dray.corpus.stream import make_order
from dray.errors import CorpusError, SpecError, StoreError
from dray.ledger import verify_ledger
from dray.release.forgetting import find_document, find_text, require_clean
from dray.runs import Run
from dray.spec import make_spec
from dray.train import train_locally
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
WORDS = [
    "red",
    "green",
    "blue",
    "river",
    "stone",
    "cloud",
    "bread",
    "wheel",
    "glass",
    "paper",
    "moon",
    "salt",
]


def text_of(seed: int, length: int = 40) -> str:
    drawn = random.Random(seed)
    return " ".join(drawn.choice(WORDS) for _ in range(length)) + f" number {seed}"


SECRET = "Ann Smith of 7 Hill Road owes nine hundred and twelve pounds to the baker; " + text_of(
    999
)


def tree_of(home: Path, **sections: Any) -> dict[str, Any]:
    tree = tiny_tree(home)
    tree["data"] |= {"train": [str(home / "some.jsonl")], "validation": None, "sequence_tokens": 64}
    tree["validation"] = {}
    tree |= {"resources": {"workers": 1}, "zero": {"stage": 0}, "duration": {"steps": 12}}
    tree["checkpoint"] = {"every_steps": 4, "keep_last": 10}
    return tree | sections


def trained(tree: dict[str, Any], storage: str, name: str) -> Run:
    spec = make_spec(tree)
    prepare(spec, storage)
    return train_locally(spec, storage=storage, run_name=name).run


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with and without the secret."""
    folder = tmp_path_factory.mktemp("forgetting")
    texts = [text_of(seed) for seed in range(40)]
    for name, some in (("some", [*texts, SECRET]), ("none", texts)):
        records = [{"text": text, "label": "ab"[len(text) % 2]} for text in some]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


@pytest.fixture(scope="module")
def storage(home: Path) -> str:
    """Runs that have seen it, as packed rows and as rows of their own, and some that have not."""
    place = str(home / "runs")
    trained(tree_of(home), place, "packed")
    label = {"text": "text", "label": "label"}
    bert = {"architecture": "bert", "hidden_size": 32, "num_layers": 1, "num_heads": 2}
    alone = tree_of(home, task="sequence_classification", model=bert)
    alone["data"] = {**alone["data"], "train": [{"path": str(home / "some.jsonl"), **label}]}
    alone["data"]["sequence_tokens"] = 128
    trained(alone, place, "alone")
    clean = tree_of(home)
    clean["data"] = {**clean["data"], "train": [str(home / "none.jsonl")]}
    trained(clean, place, "clean")
    child = {**clean, "model": {"run": "packed"}, "tokenizer": {"run": "packed"}}
    trained(child, place, "child")
    return place


def test_both_runs_that_saw_it_are_named_with_their_steps(storage: str) -> None:
    trail = find_document(storage, SECRET)
    assert trail.digest == digest_of(SECRET)
    by_name = {one.run: one for one in trail.runs}
    assert set(by_name) == {"packed", "alone", "child"}
    for name in ("packed", "alone"):
        run, one = Run.open(storage, name), by_name[name]
        manifest, spec = load_run_manifest(run), run.spec()
        order, size = make_order(manifest, spec.seed), spec.batch.global_rows
        assert one.steps
        for step in range(1, 13):  # what the order says of each step
            read = set(order.rows_at(np.arange((step - 1) * size, step * size)).tolist())
            assert (step in one.steps) == bool(read & {*one.rows}), step
        assert one.seen == [info for info in (4, 8, 12) if info >= one.steps[0]]
        assert one.clean == [info for info in (4, 8, 12) if info < one.steps[0]]
    assert len(by_name["alone"].rows) == 1
    assert by_name["child"].inherits == "packed@12"
    assert by_name["child"].seen == [4, 8, 12]
    keys = {load_run_manifest(Run.open(storage, name)).key for name in ("packed", "alone")}
    assert {held.corpus for held in trail.corpora} == keys


def test_a_document_that_nobody_has_is_found_nowhere(storage: str) -> None:
    assert find_document(storage, text_of(12345)).runs == []
    assert find_document(storage, SECRET[: len(SECRET) // 3]).corpora == []
    assert find_document(storage, SECRET[len(SECRET) // 3 :]).corpora == []
    assert find_document(storage, text_of(3) + " but another end").corpora == []
    with pytest.raises(SpecError, match="has no text"):
        find_document(storage, " \n")


def test_a_document_is_found_as_its_corpus_changed_it(
    home: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Lines that C4's rules take out and personal data that is masked are in no row."""
    lines = ["Home", f"{text_of(7)}.", f"Write to ann@example.org {text_of(8)}.", "Read more..."]
    text = "\n".join(lines)
    folder = tmp_path_factory.mktemp("changed")
    others = [f"{text_of(seed)}." for seed in range(20, 50)]
    records = [{"text": one} for one in (*others, text)]
    (folder / "raw.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    tree = tree_of(folder)
    tree["data"] |= {
        "train": str(folder / "raw.jsonl"),
        "cleaning": {"filters": {"c4": {"min_sentences": 1}}},
        "redaction": {},
    }
    storage = str(folder / "storage")
    run = trained(tree, storage, "changed")
    trail = find_document(storage, text)
    (one,) = trail.runs
    assert one.run == "changed"
    assert one.steps
    assert load_run_manifest(run).redacted == {"email": 1}
    assert trail.digest == digest_of(text)
    assert find_text(storage, trail.digest) == text
    # The beginnings of a few documents lie beside the rows, and are told of.
    shown = json.loads(Path(run.corpus, "examples.json").read_text())["kept"]
    (held,) = find_document(storage, shown[0]).corpora
    assert held.is_example
    assert not trail.corpora[0].is_example or any("[EMAIL]" in text for text in shown)


def test_a_document_is_found_by_its_digest(storage: str) -> None:
    assert find_text(storage, digest_of(SECRET)) == SECRET
    with pytest.raises(CorpusError, match="is of no document of 2 raw files"):
        find_text(storage, "0" * 32)


def test_a_run_made_again_without_it_has_a_ledger_that_proves_it(
    storage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret.txt").write_text(SECRET + "\n")
    words = ["--storage", storage, "--again", "alone", "--run", "without", "--json"]
    assert main(["forget", "--text", str(tmp_path / "secret.txt"), *words]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["again"] | {"ledger_digest": ""} == {
        "run": "without",
        "rows": [],
        "ledger_ok": True,
        "ledger_digest": "",
        "problems": [],
    }
    run = Run.open(storage, "without")
    manifest = load_run_manifest(run)
    assert manifest.dropped == {"forgotten": 1}
    assert manifest.train.num_documents == 40
    assert verify_ledger(run).ok
    assert "without" not in {one.run for one in find_document(storage, SECRET).runs}
    assert run.record()["fingerprint"] != Run.open(storage, "alone").record()["fingerprint"]


def test_what_began_with_weights_that_have_seen_it_is_not_made_again(storage: str) -> None:
    with pytest.raises(StoreError, match=r"begins with the weights of packed@12.* make packed"):
        require_clean(find_document(storage, SECRET), Run.open(storage, "child"))
    require_clean(find_document(storage, SECRET), Run.open(storage, "packed"))


def test_a_run_without_the_document_is_not_made_again(
    storage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would take as long as training, and prove something of another text."""
    with pytest.raises(StoreError, match="'clean': has no row of the document"):
        require_clean(find_document(storage, SECRET), Run.open(storage, "clean"))
    (tmp_path / "secret.txt").write_text(SECRET)
    before = sorted(path.name for path in Path(storage).iterdir())
    words = ["forget", "--text", str(tmp_path / "secret.txt"), "--storage", storage, "--again"]
    assert main([*words, "clean"]) == 2
    assert main([*words, "alone", "--run", "packed"]) == 2
    assert "--run packed: is a run that may have it" in capsys.readouterr().err
    assert sorted(path.name for path in Path(storage).iterdir()) == before


def test_trials_are_looked_through_and_corpora_without_a_run_are_told(
    storage: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "runs"
    shutil.copytree(storage, place)
    (place / "swept").mkdir()
    (place / "swept" / "sweep.json").write_text("{}")
    (place / "packed").rename(place / "swept" / "0001")
    tree = tree_of(home)
    tree["data"] |= {"sequence_tokens": 32}
    other = prepare(make_spec(tree), str(place))
    trail = find_document(str(place), SECRET)
    assert "swept/0001" in {one.run for one in trail.runs}
    assert trail.other_corpora == [other.manifest.key]
    assert trail.num_corpora == len(list((place / "corpora").glob("*/manifest.json"))) - 1
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + SECRET.encode())
    words = ["forget", "--text", str(tmp_path / "bom.txt"), "--storage"]
    assert main([*words, str(place)]) == 0
    said = capsys.readouterr().out
    assert f"document {digest_of(SECRET)}" in said
    assert f"no run has learnt from them: {other.manifest.key}" in said
    assert main([*words, str(tmp_path / "nowhere")]) == 2
    assert "nowhere: is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["forget"], "required"),
        (["forget", "--digest", "xyz"], "is no digest; 32 hexadecimal digits"),
        (["forget", "--digest", "0" * 32], "is of no document of"),
        (["forget", "--text", "/nowhere"], "/nowhere: is not there"),
        (["forget", "--text", "/"], "/: is a folder"),
        (["forget", "--digest", "0" * 32, "--run", "x"], "goes with --again"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    storage: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([*words, "--storage", storage])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert said in capsys.readouterr().err
