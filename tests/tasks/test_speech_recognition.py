"""Spoken texts: learnt from recordings, evaluated, predicted and exported."""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoModelForCTC, Wav2Vec2CTCTokenizer

from bench import spoken
from dray.corpus.prepare import prepare
from dray.errors import PlanError, UserError
from dray.release.evaluate import evaluate
from dray.release.export import export
from dray.release.predict import predict
from dray.runs import Run
from dray.spec import load_spec, make_spec
from dray.tasks.parts.sounds import RATE
from dray.tasks.speech_recognition import SpeechRecognition
from dray.train import train, train_locally
from tiny import assert_close

pytestmark = pytest.mark.usefixtures("local_ray")
TONES = {" ": 0, "a": 500, "b": 1000, "c": 2000, "d": 4000}
MODELS = {
    "log_mel": {
        "architecture": "wav2vec2-bert",
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "options": {"position_embeddings_type": "rotary", "conv_depthwise_kernel_size": 7},
    },
    "samples": {
        "architecture": "wav2vec2",
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 4,
        "options": {
            "feat_extract_norm": "layer",
            "do_stable_layer_norm": True,
            "conv_dim": [16, 16, 16, 16, 16, 16, 16],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
    },
}


def play(text: str, drawn: random.Random) -> bytes:
    """A text as a tone a letter, of 80 to 120 ms, in a little noise: a flac file."""
    rng = np.random.default_rng(drawn.randrange(2**32))
    pieces = [np.zeros(800)]
    for letter in text:
        times = np.arange(int(RATE * drawn.uniform(0.08, 0.12))) / RATE
        pieces += [0.4 * np.sin(2 * np.pi * TONES[letter] * times), np.zeros(640)]
    samples = np.concatenate(pieces)
    out = io.BytesIO()
    soundfile.write(out, samples + 0.003 * rng.normal(size=len(samples)), RATE, format="FLAC")
    return out.getvalue()


def write_tones(path: Path, num: int, seed: int) -> None:
    drawn = random.Random(seed)
    words = ("a", "bad", "cab", "dab", "add", "dd")
    texts = [" ".join(drawn.choice(words) for _ in range(drawn.randint(1, 3))) for _ in range(num)]
    table = {"audio": [play(text, drawn) for text in texts], "text": texts}
    pq.write_table(pa.table(table), path)


@pytest.fixture(scope="module")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tones")
    write_tones(folder / "train.parquet", 240, 0)
    write_tones(folder / "heldout.parquet", 40, 1)
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


def tree_of(folder: Path, features: str = "log_mel", **sections: Any) -> dict[str, Any]:
    columns = {"audio": "audio"}
    tree: dict[str, Any] = {
        "name": "tones",
        "task": {"name": "speech_recognition", "features": features, "characters": " abcd"},
        "data": {
            "train": {"path": f"{folder}/train.parquet", "columns": columns},
            "validation": {"path": f"{folder}/heldout.parquet", "columns": columns},
            "sequence_tokens": 120,
            "cleaning": {"deduplicate": "none"},
        },
        "model": MODELS[features],
        "batch": {"global_rows": 16, "micro_rows": 8},
        "optimizer": {"learning_rate": 5e-3},
        "schedule": {"name": "constant"},
        "duration": {"steps": 12},
        "precision": "fp32",
        "validation": {"metric": "cer", "max_rows": None},
        "checkpoint": {"every_steps": 5},
        "resources": {"workers": 1},
        "zero": {"stage": 0},
        "engine": {"compile": False},
    }
    return tree | sections


@pytest.fixture(scope="module")
def run(tones: Path, storage: str) -> Run:
    task = {
        "name": "speech_recognition",
        "characters": " abcd",
        "time_masks": 1,
        "band_masks": 1,
        "band_width": 8,
    }
    spec = make_spec(tree_of(tones, task=task, duration={"steps": 220}))
    prepare(spec, storage)
    return train_locally(spec, storage=storage, run_name="tones").run


def test_tones_are_learnt_and_measured(run: Run, storage: str) -> None:
    measured = run.validations()[-1]
    assert measured["cer"] < 0.1, measured
    report: dict[str, dict[str, float]] = {}
    found = evaluate(storage, "tones", report=report)
    for key, value in measured.items():
        if key in found and isinstance(value, float):
            assert found[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert report["characters"]["num"] == found["num_targets"]
    wrong = sum(report["words"][name] for name in ("substitutions", "deletions", "insertions"))
    assert wrong / report["words"]["num"] == pytest.approx(found["wer"])
    assert_close(evaluate(storage, "tones", workers=2), found)
    searched = evaluate(storage, "tones", thorough=True)
    assert searched["loss"] == pytest.approx(found["loss"])
    assert searched["cer"] <= found["cer"] + 0.02


def test_recordings_are_told_in_their_order(run: Run, storage: str, tmp_path: Path) -> None:
    drawn, texts = random.Random(5), ["bad cab", "add", "dd a dab"]
    sounds = [base64.b64encode(play(text, drawn)).decode() for text in texts]
    lines = [*sounds[:2], base64.b64encode(b"no sound").decode(), sounds[2]]
    (tmp_path / "new.jsonl").write_text(
        "".join(json.dumps({"audio": line}) + "\n" for line in lines), encoding="utf-8"
    )
    told = list(predict(storage, "tones", [str(tmp_path / "new.jsonl")]))
    assert told[2] == {"error": "no sound, or a broken one"}
    found = [record["prediction"] for record in told if "prediction" in record]
    assert sum(one == other for one, other in zip(found, texts, strict=True)) >= 2, found


def test_an_export_gives_the_same_by_transformers_alone(
    run: Run, storage: str, tmp_path: Path
) -> None:
    export(storage, "tones", str(tmp_path / "out"))
    model = AutoModelForCTC.from_pretrained(tmp_path / "out").eval()
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "out")
    content = play("cab dab", random.Random(9))
    samples, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    given = extractor(samples, sampling_rate=RATE, return_tensors="pt")
    with torch.no_grad():
        letters = model(**given).logits[0].argmax(dim=-1)
    (tmp_path / "one.jsonl").write_text(
        json.dumps({"audio": base64.b64encode(content).decode()}), encoding="utf-8"
    )
    (told,) = predict(storage, "tones", [str(tmp_path / "one.jsonl")])
    assert tokenizer.decode(letters) == told["prediction"]


def test_stages_that_an_architecture_is_not_built_under_are_refused(
    tones: Path, storage: str
) -> None:
    spec = make_spec(tree_of(tones, "samples", zero={"stage": 3}))
    with pytest.raises(PlanError, match="wav2vec2's gradients are wrong under ZeRO 3"):
        train_locally(spec, storage=storage, run_name="refused")


def task_of(**settings: Any) -> SpeechRecognition:
    return SpeechRecognition(SpeechRecognition.Settings(**settings))


def encode(task: SpeechRecognition, texts: list[str], row_tokens: int = 100) -> Any:
    from types import SimpleNamespace

    drawn = random.Random(0)
    sounds = [play("abc", drawn), play("abcd abcd", drawn), b"none", play("a", drawn)]
    files = pa.array([base64.b64encode(sound).decode() for sound in sounds[: len(texts)]])
    tools: Any = SimpleNamespace(row_tokens=row_tokens, dtype="uint16")
    return task.encode(files, pa.array(texts), tools)


def test_what_cannot_be_a_row_is_left_out_by_reason() -> None:
    encoded = encode(task_of(), ["Abc!", "abc", "a", "x" * 40], row_tokens=20)
    assert encoded.refused == {
        0: "'!' is none of task.characters",
        1: "longer than data.sequence_tokens (0.4 s)",
        2: "no sound, or a broken one",
        3: "shorter than its text takes",
    }
    assert len(encoded.lengths) == 0
    assert encode(task_of(), ["  "]).refused == {0: "nothing is said"}


@pytest.mark.parametrize(
    ("settings", "text", "letters"),
    [
        ({}, "It's  A", [11, 22, 2, 21, 1, 3]),
        ({"case": "upper", "characters": " AB"}, "ab a", [2, 3, 1, 2]),
        ({"case": "keep", "characters": "Aa甲"}, "甲Aa", [3, 1, 2]),
    ],
)
def test_letters_are_numbered_from_one(
    settings: dict[str, Any], text: str, letters: list[int]
) -> None:
    for features in ("log_mel", "samples"):
        encoded = encode(task_of(features=features, **settings), [text])
        assert encoded.columns["letters"].to_pylist() == [letters]
        assert len(encoded.columns["sound"]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"characters": "abca"}, "characters: one is there twice"),
        ({"features": "samples", "band_masks": 1}, "samples have no bands"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    task = {"name": "speech_recognition", **settings}
    with pytest.raises(UserError, match=message):
        make_spec(tree_of(Path("none"), task=task))


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_speech_is_made_again_by_the_same_seed(tmp_path: Path) -> None:
    for name in ("one", "two"):
        spoken.write(tmp_path / name, num_train=6, num_heldout=3, seed=4)
    tables = [pq.read_table(tmp_path / name / "train.parquet") for name in ("one", "two")]
    assert tables[0].equals(tables[1])
    heldout = pq.read_table(tmp_path / "one" / "heldout.parquet")
    voices = [
        {voice.split("+")[1] for voice in table.column("voice").to_pylist()}
        for table in (tables[0], heldout)
    ]
    assert not voices[0] & voices[1]
    assert not set(heldout.column("text").to_pylist()) & set(tables[0].column("text").to_pylist())
    samples, rate = soundfile.read(io.BytesIO(heldout.column("audio")[0].as_py()))
    assert 0.5 < len(samples) / rate < 8


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_the_recipe_hears_voices_that_it_never_heard(tmp_path: Path) -> None:
    folder = tmp_path / "speech"
    spoken.write(folder, num_train=spoken.NUM_TRAIN, num_heldout=spoken.NUM_HELDOUT)
    paths = [
        f"data.train.path={folder}/train.parquet",
        f"data.validation.path={folder}/heldout.parquet",
    ]
    train(load_spec("spoken", paths), storage=str(tmp_path))
    assert evaluate(str(tmp_path), "spoken", step="best")["cer"] <= 0.05
