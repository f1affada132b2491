"""docs/security.md lists every case of abuse that is tried, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FEWEST = 25


def tried() -> list[str]:
    """Names of the tests of tests/security."""
    return [
        node.name
        for path in sorted((ROOT / "tests" / "security").glob("test_*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]


def test_the_table_has_the_tests():
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    listed = re.findall(r"\| `(test_\w+)` \|$", page, re.M)
    assert sorted(listed) == sorted(tried())
    assert len(listed) == len(set(listed)) >= FEWEST
