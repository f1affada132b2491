"""A team's own task: one file and an entry point, and no line of dray changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny import tiny_tree

FILE = '''
from dray.spec.sections import Int, Section
from dray.tasks import IGNORED
from dray.tasks.causal_lm import CausalLM


class TailLM(CausalLM):
    """Next-token prediction at the end of a row alone."""

    class Settings(Section):
        """What counts."""

        tokens: Int = 8
        """How many of a row's last tokens."""

    name = "tail_lm"
    is_default = False

    def collate(self, table, draw=0):
        batch = super().collate(table, draw)
        batch["labels"][:, : -self.settings.tokens] = IGNORED
        return batch
'''
METADATA = "Metadata-Version: 2.1\nName: team-tasks\nVersion: 0.1\n"


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


def test_a_task_of_another_package_is_learnt_by_its_name(tmp_path: Path, tiny_corpus: Path) -> None:
    site = tmp_path / "site"
    (site / "team_tasks-0.1.dist-info").mkdir(parents=True)
    (site / "team_tasks.py").write_text(FILE, encoding="utf-8")
    (site / "team_tasks-0.1.dist-info" / "METADATA").write_text(METADATA, encoding="utf-8")
    (site / "team_tasks-0.1.dist-info" / "entry_points.txt").write_text(
        "[dray.tasks]\ntail_lm = team_tasks:TailLM\n", encoding="utf-8"
    )
    tree: dict[str, Any] = tiny_tree(tiny_corpus, task={"name": "tail_lm", "tokens": 4})
    (tmp_path / "spec.yaml").write_text(json.dumps(tree), encoding="utf-8")
    refused = dray(tmp_path, "plan", "spec.yaml", "task.tokens=many")
    assert refused.returncode == 2
    assert "tokens" in refused.stderr
    done = dray(tmp_path, "train", "spec.yaml")
    assert done.returncode == 0, done.stderr
    shown = json.loads(dray(tmp_path, "show", "tiny", "--json").stdout)
    assert shown["validation"]["num_targets"] <= 16 * 4
    assert shown["validation"]["perplexity"] > 1
    written = dray(tmp_path, "generate", "tiny", "--prompt", "def ", "--max-tokens", "4")
    assert written.returncode == 0, written.stderr
