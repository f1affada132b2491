"""Explanations of real small runs: attributions that add up, words that decide, training rows that
are where they are said to be and were learnt when they are said to have been."""

from __future__ import annotations

import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dray.cli import main
from dray.corpus.manifest import load_run_manifest
from dray.corpus.prepare import prepare
from dray.corpus.stream import make_order, read_rows
from dray.ledger import find_steps
from dray.release.explaining.neighbours import LastLayer, Search
from dray.release.predict import Predictor
from dray.release.trained import load_trained
from dray.runs import Run
from dray.spec import make_spec
from dray.train import train_locally
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
WORDS = {"good": ("fine", "lovely", "bright"), "bad": ("poor", "ugly", "dull")}
BERT = {"architecture": "bert", "hidden_size": 32, "num_layers": 2, "num_heads": 2}


def reviews(drawn: random.Random, num: int) -> list[dict[str, Any]]:
    found = []
    for _ in range(num):
        label = drawn.choice(("good", "bad"))
        words = drawn.choices(("a", "film", "it", "was", "that"), k=drawn.randint(3, 7))
        words.insert(drawn.randrange(len(words)), drawn.choice(WORDS[label]))
        found.append({"text": " ".join(words), "label": label, "stars": len(words)})
    return found


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A classifier by an encoder, one by a decoder, and a run of numbers, of the same texts."""
    folder = tmp_path_factory.mktemp("explained")
    drawn = random.Random(0)
    for part, num in (("a", 90), ("b", 70)):
        lines = [json.dumps(record) for record in reviews(drawn, num)]
        lines.insert(11, "{broken")
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, task, model in (
        ("encoder", "sequence_classification", BERT),
        ("decoder", "sequence_classification", {**BERT, "architecture": "llama"}),
        ("numbers", "regression", BERT),
    ):
        label = "stars" if task == "regression" else "label"
        spec = make_spec(
            tiny_tree(
                folder,
                name=name,
                task=task,
                data={
                    "train": [
                        {"path": f"{folder}/{part}.jsonl", "label": label} for part in ("a", "b")
                    ],
                    "validation": None,
                    "sequence_tokens": 32,
                    "max_bad_share": 0.5,
                    "cleaning": {"deduplicate": "none"},
                },
                tokenizer={"train": "byte_bpe", "vocab_size": 330},
                model=model,
                batch={"global_rows": 16, "micro_rows": 16},
                duration={"steps": 40},
                resources={"workers": 1},
            )
        )
        prepare(spec, str(folder / "runs"))
        train_locally(spec, storage=str(folder / "runs"), run_name=name)
    return str(folder / "runs")


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    path = tmp_path / "asked.jsonl"
    texts = ("that film was lovely", "it was a dull film that", "a bright film")
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


def explained(storage: str, capsys: Any, name: str, path: Path, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    where = ("--storage", storage, "--data", str(path), "--json")
    assert main(["explain", name, *where, *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("name", ["encoder", "decoder", "numbers"])
def test_attributions_add_up_and_the_word_that_decides_has_the_most(
    storage: str, asked: Path, capsys: Any, name: str
) -> None:
    found = explained(storage, capsys, name, asked, "--neighbours", "0")
    assert found["method"] == "gradients"
    assert len(found["records"]) == 3
    for record, said in zip(found["records"], ("lovely", "dull", "bright"), strict=True):
        total = sum(one["value"] for one in record["attributions"])
        distance = record["output"] - record["baseline"]
        assert total == pytest.approx(distance + record["completeness_error"], abs=1e-6)
        assert abs(record["completeness_error"]) <= 0.01 * max(abs(distance), 1e-3)
        text = "".join(one["token"] for one in record["attributions"])
        assert record["text"] in text
        if name == "numbers":
            continue
        assert record["prediction"] == record["explained"]
        starts = np.cumsum([0, *(len(one["token"]) for one in record["attributions"])])
        at = text.index(said)
        inside = sum(
            one["value"]
            for one, start in zip(record["attributions"], starts, strict=False)
            if start + len(one["token"]) > at and start < at + len(said)
        )
        assert inside > total / 2


def test_rollout_is_a_share_of_each_token(storage: str, asked: Path, capsys: Any) -> None:
    for name in ("encoder", "decoder"):
        words = ("--method", "rollout", "--neighbours", "0")
        found = explained(storage, capsys, name, asked, *words)
        for record in found["records"]:
            shares = [one["share"] for one in record["rollout"]]
            assert sum(shares) == pytest.approx(1)
            assert min(shares) > 0


@pytest.mark.parametrize("by", ["cosine", "gradient"])
def test_neighbours_are_where_they_are_said_to_be(
    storage: str, asked: Path, capsys: Any, by: str
) -> None:
    found = explained(storage, capsys, "encoder", asked, "--by", by, "--neighbours", "3")
    assert found["num_rows_searched"] == 160
    run = Run.open(storage, "encoder")
    order = make_order(load_run_manifest(run), 0)
    for record in found["records"]:
        assert len(record["nearest"]) == 3
        values = [near["similarity"] for near in record["nearest"]]
        assert values == sorted(values, reverse=True)
        if by == "cosine":
            assert all(near["label"] == record["prediction"] for near in record["nearest"])
        assert all(near["similarity"] < 0 for near in record.get("opposed", ()))
        for near in (*record["nearest"], *record.get("opposed", ())):
            assert near["places"]
            for place in near["places"]:
                content = Path(place["file"]).read_bytes()
                line = content[place["offset"] :].split(b"\n", 1)[0]
                assert json.loads(line)["text"] == near["text"]
                readable = [line for line in content.split(b"\n") if line and line != b"{broken"]
                assert json.loads(readable[place["document"] - 1])["text"] == near["text"]
            for step in near["steps"]:
                assert near["row"] in order.rows((step - 1) * 16, step * 16)
            assert len(near["steps"]) == 4  # 40 steps of 16 rows: four epochs of 160


def test_likeness_by_gradient_is_the_product_of_the_loss_gradients(storage: str) -> None:
    trained = load_trained(storage, "encoder")
    predictor = Predictor(trained)
    layer = LastLayer(predictor.task, predictor.objective, trained.where)
    split = trained.manifest.train
    rows = read_rows(trained.corpus, trained.manifest, split, np.arange(6))
    batch = predictor.task.collate(rows)
    vectors, slopes = layer.of(batch)
    assert slopes is not None
    search = Search(vectors[:1], slopes[:1], 6)
    search.add(np.arange(6), vectors, slopes)
    found = {one.row: one.similarity for one in (*search.nearest(0), *search.opposed(0))}
    head = trained.model.classifier
    gradients = []
    for place in range(6):
        trained.model.zero_grad()
        one = predictor.task.collate(rows.slice(place, 1))
        terms, _ = predictor.objective(one)
        terms["loss"][0].backward()
        gradients.append(torch.cat([head.weight.grad.flatten(), head.bias.grad]).clone())
    for place, gradient in enumerate(gradients):
        expected = float(gradients[0] @ gradient)
        assert found[place] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_steps_are_those_of_the_history(storage: str) -> None:
    run = Run.open(storage, "encoder")
    found = find_steps(run, [0, 7, 159])
    assert [len(steps) for steps in found.values()] == [4, 4, 4]


def test_raw_files_that_are_gone_are_no_places(
    storage: str, asked: Path, capsys: Any, tmp_path: Path
) -> None:
    file = Path(storage).parent / "b.jsonl"
    kept = file.read_text()
    changed = [json.dumps({"text": "none of it", "label": "good"})] * 3
    file.write_text("\n".join(changed), encoding="utf-8")
    try:
        found = explained(storage, capsys, "encoder", asked, "--neighbours", "40")
    finally:
        file.write_text(kept, encoding="utf-8")
    nears = [near for record in found["records"] for near in record["nearest"]]
    named = {place["file"] for near in nears for place in near["places"]}
    assert named == {str(Path(storage).parent / "a.jsonl")}
    assert any(not near["places"] for near in nears)


def test_all_of_it_is_a_page(storage: str, asked: Path, capsys: Any, tmp_path: Path) -> None:
    page = tmp_path / "why.html"
    asked.write_text(json.dumps({"text": "<b>lovely</b> film"}), encoding="utf-8")
    explained(storage, capsys, "encoder", asked, "--html", str(page), "--by", "gradient")
    text = page.read_text(encoding="utf-8")
    assert "Training rows that are most like it" in text
    assert "<b>" not in text
    assert "http" not in text
    assert not list(tmp_path.glob("*.partial"))
    assert main(["explain", "encoder", "--storage", storage, "--data", str(asked)]) == 0
    said = capsys.readouterr().out
    assert "gradients:" in said
    assert "learnt at step" in said


def test_patches_of_an_image_are_those_that_it_hangs_on(tmp_path: Path, capsys: Any) -> None:
    drawn = np.random.default_rng(0)
    lines = []
    for _ in range(200):
        bright = int(drawn.integers(2))
        pixels = drawn.integers(0, 60, (16, 16)).astype(np.uint8)
        pixels[4:8, 8:12] = 250 if bright else 5  # what tells both apart
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        image = base64.b64encode(out.getvalue()).decode()
        lines.append(json.dumps({"image": image, "label": ["off", "on"][bright]}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    tree = tiny_tree(
        tmp_path,
        task={"name": "image_classification", "size": 16, "channels": 1},
        data={
            "train": {"path": f"{tmp_path}/a.jsonl", "columns": {"image": "image"},
                      "label": "label"},
            "validation": None,
        },
        model={**BERT, "architecture": "vit", "options": {"patch_size": 4}},
        batch={"global_rows": 20, "micro_rows": 20},
        duration={"steps": 60},
        resources={"workers": 1},
    )  # fmt: skip
    del tree["tokenizer"]
    spec, storage = make_spec(tree), str(tmp_path / "runs")
    prepare(spec, storage)
    train_locally(spec, storage=storage, run_name="lamp")
    page = tmp_path / "why.html"
    words = ("--rows", "6", "--neighbours", "2", "--html", str(page))
    found = explained(storage, capsys, "lamp", tmp_path / "a.jsonl", *words)
    assert found["method"] == "occlusion"
    assert {record["prediction"] for record in found["records"]} == {"on", "off"}
    for record in found["records"]:
        patches = np.array(record["patches"])
        assert patches.shape == (8, 8)
        if record["prediction"] == "on":  # what is off hangs on no one patch
            row, column = np.unravel_index(patches.argmax(), patches.shape)
            assert 2 <= row < 4
            assert 4 <= column < 6
        assert [near["label"] for near in record["nearest"]] == [record["prediction"]] * 2
        assert record["nearest"][0]["similarity"] == pytest.approx(1, abs=1e-4)  # itself
        assert all(near["places"] for near in record["nearest"])
    assert page.read_text(encoding="utf-8").count("<svg") == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("encoder", "--rows", "0"), "--rows: is 0"),
        (("encoder", "--neighbours", "-1"), "--neighbours: is -1"),
        (("encoder", "--search", "0"), "--search: is 0"),
        (("encoder", "--method", "occlusion"), "--method occlusion"),
        (("numbers", "--by", "gradient"), "tells no probabilities"),
        (("nobody",), "nobody"),
    ],
)
def test_what_cannot_be_explained_is_refused_in_one_line(
    storage: str, asked: Path, capsys: Any, words: tuple[str, ...], message: str
) -> None:
    capsys.readouterr()
    where = ("--storage", storage, "--data", str(asked))
    assert main(["explain", words[0], *where, *words[1:]]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert not said.out
