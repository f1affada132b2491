"""What answers are worth: by dray's own rewards, and by those of installed packages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dray.errors import SpecError
from dray.spec.tasks import make_task
from dray.tasks.rewards import find_reward, pattern_reward


def test_numbers_texts_and_patterns_are_judged() -> None:
    numeric, exact = find_reward("numeric"), find_reward("exact")
    assert numeric("so it is 1,204.0", "#### 1204", "") == 1.0
    assert numeric("12 or 13", "12", "") == 0.0
    assert numeric("none", "12", "") == 0.0
    assert numeric("it is .5", "0.50", "") == numeric("1e5", "100,000", "") == 1.0
    assert numeric("5", ".5", "") == numeric("from 10-3", "-3", "") == 0.0
    assert numeric("-3", "3", "") == 0.0
    assert exact(" yes\n", "yes", "") == 1.0
    assert exact("yes!", "yes", "") == 0.0
    assert pattern_reward(r"\d+")(" 77 ", "", "") == 1.0
    assert pattern_reward(r"\d+")("77 apples", "", "") == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            '{"rewards": {"os:system": 1.0}}',
            "no reward 'os:system'; there are exact, numeric",
        ),
        ('{"rewards": {}}', "none is given"),
        ('{"rewards": {"regex": 1.0}}', "pattern"),
        ('{"rewards": {"regex": 1.0}, "pattern": "("}', "no regular expression"),
        ('{"rewards": {"exact": -1.0}}', "greater than 0"),
    ],
)
def test_rewards_are_named_and_no_code_of_a_spec_is_run(settings: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task({"name": "policy", **json.loads(settings)})


def test_a_reward_of_an_installed_package_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "team_rewards.py").write_text(
        "def polite(answer, wanted, prompt):\n"
        "    return float('please' in answer) - 0.5 * ('never' in answer)\n"
        "def broken(answer, wanted, prompt):\n"
        "    return float('nan')\n"
    )
    installed = tmp_path / "team_rewards-0.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: team-rewards\nVersion: 0.1\n")
    (installed / "entry_points.txt").write_text(
        "[dray.tasks.rewards]\npolite = team_rewards:polite\nbroken = team_rewards:broken\n"
        "gone = team_rewards:gone\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_reward("polite")("yes, please", "", "") == 1.0
    task = make_task({"name": "policy", "rewards": {"polite": 0.5, "exact": 1.0}})
    assert [weight for weight, _ in task.rewards()] == [0.5, 1.0]
    with pytest.raises(ValueError, match="reward broken is nan"):
        find_reward("broken")("yes", "", "")
    with pytest.raises(SpecError, match="team_rewards:gone cannot be loaded"):
        find_reward("gone")
    with pytest.raises(SpecError, match="reward absent: is not installed"):
        find_reward("absent")
