"""Bad input through the command line: exit code 2, one line on stderr, nothing on stdout, nothing
left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dray.cli import main
from tiny import tiny_tree


@pytest.fixture
def spec_file(tmp_path: Path, tiny_corpus: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tiny_corpus)))
    return path


def refused(arguments: list[str], storage: Path, capsys: Any) -> str:
    """Run a command that must be refused; its one line."""
    capsys.readouterr()
    code = main([*arguments, "--storage", str(storage)])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("dray: ")]
    assert code == 2, err
    assert out == ""
    assert len(lines) == 1
    assert "Traceback" not in err
    left = [path for path in storage.rglob("*") if path.is_file()] if storage.is_dir() else []
    assert left == [], left
    return lines[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.globl_rows=3", "did you mean batch.global_rows?"),
        ("batch.global_rows=many", "batch.global_rows = 'many'"),
        ("optimizer.learning_rate=-1", "a number above 0"),
        ("batch={global_rows: 10, micro_rows: 4}", "not a multiple of 2 ranks × 4 rows (8)"),
        ("model.architecture=lama", "llama"),
        ("model={path: nowhere}", "nowhere"),
        ("tokenizer={path: nowhere}", "nowhere"),
        ("model.vocab_size=300", "vocab"),
        ("precision=fp16", "precision"),
        ("resources.gpus_per_worker=1", "GPU"),
        ("data.train=nowhere/*.jsonl", "nowhere"),
        ("validation.metric=accurracy", "accuracy"),
    ],
)
@pytest.mark.usefixtures("local_ray")
def test_a_spec_that_cannot_run_is_refused(
    spec_file: Path, tmp_path: Path, capsys: Any, override: str, message: str
):
    assert message in refused(["train", str(spec_file), override], tmp_path / "runs", capsys)


@pytest.mark.parametrize(
    ("name", "content", "data", "message"),
    [
        ("empty.jsonl", b"", {}, "only empty files"),
        ("other.txt", b"x", {"path": "*.parquet"}, "no matching file"),
        ("columns.jsonl", b'{"body": "some words"}\n' * 20, {}, "body"),
        (
            "short.jsonl",
            b'{"text": "ab"}\n{"text": "cd"}\n',
            {"cleaning": {"min_chars": 5}},
            "too_short",
        ),
        ("label.csv", b"text,label\nhello,0\n", {"label": "lable"}, "lable"),
    ],
)
@pytest.mark.usefixtures("local_ray")
def test_data_that_is_no_corpus_is_refused(
    tmp_path: Path, capsys: Any, name: str, content: bytes, data: dict[str, Any], message: str
):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / name).write_bytes(content)
    source = {"path": f"{folder}/{data.get('path', name)}"} | (
        {"label": data["label"]} if "label" in data else {}
    )
    tree = tiny_tree(folder)
    tree["data"] = {"train": source, "sequence_tokens": 64, "cleaning": data.get("cleaning", {})}
    if "label" in data:
        tree["task"], tree["model"]["architecture"] = "sequence_classification", "bert"
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(tree))
    line = refused(["train", str(spec)], tmp_path / "runs", capsys)
    assert message in line


def test_commands_about_runs_that_are_not_there(tmp_path: Path, capsys: Any):
    for command in (
        ["show", "none"],
        ["verify", "none"],
        ["evaluate", "none"],
        ["export", "none", str(tmp_path / "x")],
        ["generate", "none", "--prompt", "x"],
    ):
        assert "none" in refused(command, tmp_path / "runs", capsys)


def test_missing_specs_and_unknown_recipes(tmp_path: Path, capsys: Any):
    assert "did you mean quickstart?" in refused(["plan", "quickstrat"], tmp_path / "runs", capsys)
    assert "no such file" in refused(
        ["train", str(tmp_path / "no.yaml")], tmp_path / "runs", capsys
    )
    (tmp_path / "bad.yaml").write_text("a: [")
    assert "not YAML" in refused(["train", str(tmp_path / "bad.yaml")], tmp_path / "runs", capsys)


def test_a_plan_that_does_not_fit_names_what_would(tmp_path: Path, spec_file: Path, capsys: Any):
    wide = [
        "model.hidden_size=12288",
        "model.num_layers=96",
        "model.num_heads=96",
        "resources.gpus_per_worker=1",
    ]
    line = refused(["plan", str(spec_file), *wide, "--shape", "1x2xL4"], tmp_path / "runs", capsys)
    assert "does not fit" in line or "GB" in line
    assert "--shape" in refused(
        ["plan", str(spec_file), "--shape", "2x8xH1000"], tmp_path / "runs", capsys
    )


def test_storage_that_cannot_hold_runs(tmp_path: Path, spec_file: Path, capsys: Any):
    file = tmp_path / "file"
    file.write_text("x")
    assert main(["train", str(spec_file), "--storage", str(file)]) == 2
    assert "file" in capsys.readouterr().err
    assert main(["runs", "--storage", "ftpx://nowhere/x"]) == 2
    assert "ftpx" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_storage_without_permission(tmp_path: Path, spec_file: Path, capsys: Any):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert main(["train", str(spec_file), "--storage", str(locked / "runs")]) == 2
    assert "writ" in capsys.readouterr().err


def test_an_address_where_no_cluster_answers(tmp_path: Path, spec_file: Path):
    """A process of its own: one that is connected already asks nobody."""
    command = [
        sys.executable,
        "-m",
        "dray.cli",
        "train",
        str(spec_file),
        "--storage",
        str(tmp_path / "runs"),
    ]
    done = subprocess.run(
        [*command, "--address", "127.0.0.1:1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "dray: --address: no Ray cluster answers at 127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_an_unknown_option_is_a_usage_error(spec_file: Path):
    with pytest.raises(SystemExit) as caught:
        main(["train", str(spec_file), "--storge", "x"])
    assert caught.value.code == 2
