"""A team's own task, taken from docs/extending.md: a package with an entry point, and no line of
dray changed."""

from __future__ import annotations

import json
import math
import os
import random
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tiny import tiny_tree

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
RATES = {"quiet": 1.0, "lively": 4.0, "crowded": 12.0}


def install(site: Path) -> None:
    """As pip would: the files of the page, and what its pyproject.toml says of them."""
    page = PAGE.read_text(encoding="utf-8")
    for name, content in re.findall(
        r"```python\n# (team_tasks/\w+\.py)[^\n]*\n(.*?)```", page, re.S
    ):
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(content, encoding="utf-8")
    (toml,) = re.findall(r"```toml\n(# pyproject\.toml\n.*?)```", page, re.S)
    project = tomllib.loads(toml)["project"]
    metadata = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in points.items())
        for group, points in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines))


def write_counts(path: Path, num: int) -> None:
    """Texts of which one word sets the rate of a count."""
    drawn = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for place in range(num):
            kind = drawn.choice(list(RATES))
            count, product = -1, 1.0
            while product > math.exp(-RATES[kind]):  # Knuth's way to a Poisson distribution
                count, product = count + 1, product * drawn.random()
            record = {"text": f"it was a {kind} day at door {place}", "label": count}
            file.write(json.dumps(record) + "\n")


def dray(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    paths = [str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-m", "dray.cli", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_task_of_the_page_is_learnt_measured_and_tells(tmp_path: Path) -> None:
    install(tmp_path / "site")
    write_counts(tmp_path / "counts.jsonl", 400)
    tree = tiny_tree(
        tmp_path,
        task={"name": "rate", "least": 0.01},
        data={
            "train": {"path": "counts.jsonl", "label": "label"},
            "validation": {"share": 0.2},
            "sequence_tokens": 32,
        },
        tokenizer={"train": "byte_bpe", "vocab_size": 300},
        model={"architecture": "bert", "hidden_size": 64, "num_layers": 2, "num_heads": 4},
        batch={"global_rows": 32, "micro_rows": 16},
        optimizer={"learning_rate": 3e-3},
        duration={"steps": 60},
        validation={"every_steps": 60, "metric": "mae", "max_rows": None},
        schedule={"name": "constant"},
    )
    (tmp_path / "spec.yaml").write_text(json.dumps(tree), encoding="utf-8")
    refused = dray(tmp_path, "plan", "spec.yaml", "task.least=-1")
    assert refused.returncode == 2
    assert "least" in refused.stderr
    done = dray(tmp_path, "train", "spec.yaml")
    assert done.returncode == 0, done.stderr
    shown = json.loads(dray(tmp_path, "show", "tiny", "--json").stdout)
    # The mean count alone is off by 4; the rates themselves, by 1.4.
    assert shown["validation"]["mae"] < 2.2
    (tmp_path / "new.jsonl").write_text(
        "".join(json.dumps({"text": f"it was a {kind} day at door 7"}) + "\n" for kind in RATES)
    )
    told = dray(tmp_path, "predict", "tiny", "--data", "new.jsonl")
    assert told.returncode == 0, told.stderr
    rates = [json.loads(line)["prediction"] for line in told.stdout.splitlines()]
    assert rates[0] < 2.5 < rates[1] < 8 < rates[2] < 18
