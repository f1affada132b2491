"""Next items, ratings, vectors and balanced classes on real data: learnt, the same under ZeRO 3,
measured and predicted."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dray.corpus.manifest import load_run_manifest
from dray.corpus.prepare import prepare
from dray.corpus.stream import make_order, read_rows
from dray.errors import SpecError
from dray.release.evaluate import evaluate
from dray.release.predict import Counts, predict
from dray.runs import Run
from dray.spec import make_spec
from dray.train.driver import train
from resuming import assert_same_steps
from tiny import assert_close, tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
STEPS = 32


def films(shared_data: Path, folder: Path) -> Path:
    """The ratings of 80 people, and the films' names."""
    with gzip.open(shared_data / "movielens_latest_small" / "ratings.csv.gz", "rt") as file:
        rows = [row for row in csv.reader(file) if row[0] == "userId" or int(row[0]) <= 80]
    with (folder / "ratings.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "ratings.csv"


def next_item(shared_data: Path, folder: Path) -> dict[str, Any]:
    names = str(shared_data / "movielens_latest_small" / "movies.csv.gz")
    gather = {
        "by": "userId",
        "order": "timestamp",
        "names": {"path": names, "id": "movieId", "name": "title"},
    }
    source = {"path": str(films(shared_data, folder)), "columns": {"items": "movieId"}}
    return tiny_tree(
        folder,
        task="next_item",
        data={
            "train": {**source, "gather": {**gather, "leave_out": 2}},
            "validation": {**source, "gather": {**gather, "leave_out": 1}},
            "sequence_tokens": 50,
            "cleaning": {"deduplicate": "none"},
        },
        tokenizer={"train": "words", "vocab_size": 5000},
        model={"architecture": "gpt2", "hidden_size": 32, "num_layers": 1, "num_heads": 2},
        batch={"global_rows": 24, "micro_rows": 6},
        validation={"metric": "ndcg_10", "max_rows": None},
    )


def rating(shared_data: Path, folder: Path) -> dict[str, Any]:
    source = {
        "path": str(films(shared_data, folder)),
        "columns": {"user": "userId", "item": "movieId"},
        "label": "rating",
    }
    return tiny_tree(
        folder,
        task={"name": "rating", "low": 0.5, "vector_size": 8, "unknown_share": 0.1},
        data={"train": source, "validation": {"share": 0.1}, "sequence_tokens": 2},
        tokenizer={"train": "words", "vocab_size": 6000},
        model={"architecture": "bert", "hidden_size": 32, "num_layers": 1, "num_heads": 2},
        batch={"global_rows": 256, "micro_rows": 64},
        validation={"metric": "rmse", "max_rows": None},
    )


def embedding(shared_data: Path, folder: Path) -> dict[str, Any]:
    source = {
        "path": str(shared_data / "dialogue" / "alpaca_en_demo.json.gz"),
        "text": "instruction",
        "columns": {"text_pair": "output"},
    }
    return tiny_tree(
        folder,
        task={"name": "embedding", "temperature": 0.1},
        data={"train": source, "validation": {"share": 0.2}, "sequence_tokens": 48},
        tokenizer={"train": "byte_bpe", "vocab_size": 2000},
        model={"architecture": "bert", "hidden_size": 64, "num_layers": 1, "num_heads": 4},
        batch={"global_rows": 32, "micro_rows": 4},
        validation={"metric": "mrr", "max_rows": None},
    )


def classes(shared_data: Path, folder: Path) -> dict[str, Any]:
    """Which kind of text a document is of: of the rare kinds there are a few dozens."""
    kinds = {
        "abc_news": "prose/news",
        "movie_reviews": "prose/reviews",
        "shakespeare": "verse/plays",
        "state_union": "prose/speeches",
        "inaugural": "prose/speeches",
    }
    found = []
    for path in sorted((shared_data / "corpus_en").glob("*.jsonl.gz"))[:6]:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                if record["source"] in kinds:
                    kind = kinds[record["source"]]
                    found.append(json.dumps({"text": record["text"][:300], "kind": kind}))
    (folder / "kinds.jsonl").write_text("\n".join(found), encoding="utf-8")
    return tiny_tree(
        folder,
        task={"name": "sequence_classification", "labels": "paths", "class_weights": "balanced"},
        data={
            "train": {"path": f"{folder}/kinds.jsonl", "label": "kind"},
            "validation": {"share": 0.2},
            "sequence_tokens": 48,
            "balance": 0.5,
        },
        tokenizer={"train": "byte_bpe", "vocab_size": 1000},
        model={"architecture": "bert", "hidden_size": 32, "num_layers": 1, "num_heads": 2},
        batch={"global_rows": 32, "micro_rows": 8},
        validation={"metric": "path_f1", "max_rows": None},
    )


KINDS = {  # task: (its spec, a metric, the least or most of it after training)
    "next_item": (next_item, "loss", (0.0, 8.2)),
    "rating": (rating, "rmse", (0.0, 1.06)),
    "embedding": (embedding, "recall_10", (0.09, 1.0)),
    "classes": (classes, "path_f1", (0.66, 1.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_learnt_under_any_stage(shared_data: Path, tmp_path: Path, kind: str) -> None:
    make, metric, (least, most) = KINDS[kind]
    storage, folder = str(tmp_path / "runs"), tmp_path / "in"
    folder.mkdir()
    tree = {
        **make(shared_data, folder),
        "duration": {"steps": STEPS},
        "checkpoint": {"every_steps": 4},
        "optimizer": {"name": "adamw", "learning_rate": 3e-3},
        "resources": {"workers": 2},
        "zero": {"stage": 0},
    }
    prepare(make_spec(tree), storage)
    whole = train(make_spec(tree), storage=storage, run_name="whole").run
    measured = whole.validations()[-1]
    assert least <= measured[metric] <= most, measured
    found = evaluate(storage, "whole")
    values = {key: value for key, value in measured.items() if key in found}
    assert_close({key: found[key] for key in values}, values, rel=1e-5)
    apart = train(make_spec({**tree, "zero": {"stage": 3}}), storage=storage, run_name="apart").run
    assert_same_steps(apart, whole)
    CHECKS[kind](storage, folder)


def check_next_item(storage: str, folder: Path) -> None:
    """Ten films by their names that somebody has not seen; the test is the last of each."""
    manifest = load_run_manifest(Run.open(storage, "whole"))
    assert manifest.validation is not None
    assert (manifest.validation.num_documents, manifest.num_bad) == (80, 0)
    records = folder / "seen.jsonl"
    records.write_text(
        json.dumps({"items": ["Toy Story (1995)", "Heat (1995)", "no film"]}), encoding="utf-8"
    )
    lists = json.dumps({"path": str(records), "columns": {"items": "items"}})
    (told,) = predict(storage, "whole", [lists])
    assert len(told["prediction"]) == len(set(told["prediction"])) == 10
    assert not {*told["prediction"]} & {*told["items"]}
    assert all(film.endswith(")") for film in told["prediction"])
    assert told["scores"] == sorted(told["scores"], reverse=True)
    gather = json.dumps(Run.open(storage, "whole").record()["identity"]["data"]["train"][0])
    source = {**json.loads(gather), "path": str(folder / "ratings.csv")}
    source["gather"]["leave_out"] = 0
    counts = Counts()
    each = list(predict(storage, "whole", [json.dumps(source)], counts=counts))
    assert (len(each), counts.num_bad) == (80, 0)
    assert {record["userId"] for record in each} == {str(user) for user in range(1, 81)}
    assert all(not {*record["prediction"]} & {*record["items"]} for record in each)
    assert evaluate(storage, "whole", data=[json.dumps(source)])["num_targets"] == 80


def check_rating(storage: str, folder: Path) -> None:
    """Numbers in their range, for those whom nobody knows, too."""
    records = [{"user": 1, "item": 1}, {"user": "1", "item": "1"}, {"user": "x", "item": "y"}, {}]
    path = folder / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    source = json.dumps({"path": str(path), "columns": {"user": "user", "item": "item"}})
    found = list(predict(storage, "whole", [source]))
    numbers = [record["prediction"] for record in found if "prediction" in record]
    assert numbers[0] == numbers[1] != numbers[2]
    assert all(0.5 < number < 5.0 for number in numbers)
    assert [record["error"] for record in found if "error" in record] == ["no column 'user'"]


def check_embedding(storage: str, folder: Path) -> None:
    """A vector for a text alone, of length 1."""
    path = folder / "texts.jsonl"
    path.write_text(json.dumps({"instruction": "Name three fruits."}), encoding="utf-8")
    (told,) = predict(storage, "whole", [str(path)])
    assert np.linalg.norm(told["prediction"]) == pytest.approx(1.0, abs=1e-5)
    assert len(told["prediction"]) == 64


def check_classes(storage: str, folder: Path) -> None:
    """Rare classes are read more often, all rows of each before one of them again."""
    run = Run.open(storage, "whole")
    manifest = load_run_manifest(run)
    counts = manifest.train.documents_by_label
    assert [source.name for source in manifest.train.sources] == [
        f"kinds.jsonl/{label}" for label in sorted(counts)
    ]
    order, folder_of = make_order(manifest, 0), f"{storage}/corpora/{manifest.key}"
    rows = order.rows(0, 4096)
    labels = read_rows(folder_of, manifest, manifest.train, np.unique(rows)).column("label")
    of = dict(zip(np.unique(rows).tolist(), labels.to_pylist(), strict=True))
    read = Counter(manifest.labels[of[row]] for row in rows.tolist())
    roots = {label: count**0.5 for label, count in counts.items()}
    for label, root in roots.items():
        assert read[label] == pytest.approx(4096 * root / sum(roots.values()), abs=2)
        mine = [row for row in rows.tolist() if manifest.labels[of[row]] == label]
        assert len({*mine[: counts[label]]}) == min(counts[label], len(mine))
    report: dict[str, dict[str, float]] = {}
    evaluate(storage, "whole", report=report)
    assert [*report] == ["level 1", "level 2"]
    assert report["level 1"]["accuracy"] >= report["level 2"]["accuracy"]


CHECKS = {
    "next_item": check_next_item,
    "rating": check_rating,
    "embedding": check_embedding,
    "classes": check_classes,
}


def test_ratings_outside_of_their_range_cost_themselves(tmp_path: Path) -> None:
    lines = ["user,item,stars", *(f"{n % 7},{n % 5},{1 + n % 5}" for n in range(40)), "1,2,99"]
    (tmp_path / "stars.csv").write_text("\n".join(lines), encoding="utf-8")
    columns = {"user": "user", "item": "item"}
    tree = tiny_tree(
        tmp_path,
        task="rating",
        data={
            "train": {"path": f"{tmp_path}/stars.csv", "columns": columns, "label": "stars"},
            "validation": None,
            "sequence_tokens": 2,
            "cleaning": {"deduplicate": "none"},
        },
        tokenizer={"train": "words", "vocab_size": 300},
        model={"architecture": "bert", "hidden_size": 32, "num_layers": 1, "num_heads": 2},
    )
    manifest = prepare(make_spec(tree), str(tmp_path / "runs")).manifest
    assert manifest.dropped["rating outside of 1 to 5"] == 1
    assert manifest.train.num_documents == 40


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    gather = {"by": "u", "order": "t"}
    plain = {"path": "x.csv", "columns": {"items": "i"}, "gather": gather}
    for sections, message in (
        ({"task": "next_item"}, r"tokenizer\.train = byte_bpe: the tokens of next_item are whole"),
        (
            {"tokenizer": {"train": "words"}},
            "tokens of causal_lm are pieces of text; give byte_bpe",
        ),
        ({"data": {"balance": 0.5}}, r"data\.balance = 0\.5: documents of causal_lm have not one"),
        (
            {"data": {"train": {"path": "x.jsonl", "gather": gather}}},
            "data: gather: causal_lm reads text; documents are gathered of names alone",
        ),
        (
            {
                "task": {"name": "rating", "low": 5.0, "high": 1.0},
                "tokenizer": {"train": "words"},
                "data": {"train": {**plain, "label": "r"}},
            },
            "low = 5 is not below high = 1",
        ),
    ):
        tree = tiny_tree(tmp_path, **sections)
        if sections.get("task") == "next_item":
            tree["data"]["train"] = plain
        with pytest.raises(SpecError, match=message):
            make_spec(tree)
