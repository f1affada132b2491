"""What a plain `pip install` brings: recipes, spaces and prices are found from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dray.plan import load_prices

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_recipes_and_spaces_come_with_the_wheel(tmp_path: Path) -> None:
    """The wheel is built and installed without what it depends on, beside this environment."""
    place = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("dray-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(place), str(wheel)], check=True)
    code = (
        "import dray; from dray.spec import recipe_names\n"
        "from dray.sweep.space import SPACES, load_space\n"
        "print(dray.__file__); print(*recipe_names()); print(*SPACES.names())\n"
        "[load_space(name) for name in SPACES.names()]\n"
        "from dray.plan import load_prices; print(load_prices().as_of)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert found[0].startswith(str(place))
    recipes = sorted(path.stem for path in (ROOT / "src/dray/recipes").glob("*.yaml"))
    spaces = sorted(path.stem for path in (ROOT / "tune_spaces").glob("*.yaml"))
    assert found[1].split() == recipes
    assert found[2].split() == spaces
    assert len(spaces) >= 6
    assert found[3] == load_prices().as_of
