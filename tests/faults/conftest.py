"""What the tests of faults share: the run that nothing happens to, and the table of what each fault
cost."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from harness import INJECTED, Measured, make_case, measure

from dray.runs import Run
from dray.spec import make_spec
from dray.train.driver import train

RELIABILITY = Path(__file__).parents[2] / "docs" / "reliability.md"
ROWS: list[tuple[str, Measured]] = []
FAULT_FILE = Path(tempfile.mkdtemp(prefix="dray-fault-"), "named")

# What every process of the tests' Ray inherits, which is started later: faults asleep, and S3's
# credentials.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(INJECTED), os.environ.get("PYTHONPATH")))
)
os.environ["DRAY_FAULT_FILE"] = str(FAULT_FILE)
os.environ.setdefault(
    "RAY_worker_niceness", "0"
)  # the ranks are what is tested here, not what runs beside
for _name, _value in {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}.items():
    os.environ.setdefault(_name, _value)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-figures",
        action="store_true",
        help="write what was measured into docs/reliability.md",
    )


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One storage for all runs: the corpus is prepared once."""
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def undisturbed(storage: str, tiny_corpus: Path, local_ray: None) -> Run:
    """The run that nothing happens to."""
    return train(make_spec(make_case(tiny_corpus)), storage=storage, run_name="undisturbed").run


@pytest.fixture
def name_fault(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Name the place (`module:function:moment`) where one of the processes that start from now on
    meets a fault, once; the file that is there when it has."""

    def name(place: str, action: str = "kill") -> Path:
        FAULT_FILE.write_text(f"{place}:{tmp_path / 'happened'}:{action}")
        return tmp_path / "happened"

    yield name
    FAULT_FILE.unlink(missing_ok=True)


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[..., Measured]:
    """`measure`, whose figures enter the table under the first sentence of the test's docstring."""

    def take(run: Run, undisturbed: Run, **options: Any) -> Measured:
        found = measure(run, undisturbed, **options)
        case = getattr(request.node, "callspec", None)
        row = " ".join(request.function.__doc__.split()).partition(". ")[0].rstrip(".")
        ROWS.append((row.replace("{id}", case.id.replace("-", " ") if case else ""), found))
        return found

    return take


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not session.config.getoption("--write-figures") or not ROWS:
        return
    from bench.report import write_section

    lines = [
        "| fault | cause in the record | steps redone | rows repeated, skipped | seconds to the "
        "next new step | weights at the end |",
        "|---|---|--:|--:|--:|---|",
    ]
    for fault, row in ROWS:
        causes = ", ".join(f"`{cause}`" for cause in dict.fromkeys(row.causes)) or "–"
        seconds = "–" if row.seconds is None else f"{row.seconds:.0f}"
        lines.append(
            f"| {fault} | {causes} | {row.steps_redone} | {row.repeated}, {row.skipped} | "
            f"{seconds} | {row.weights} |"
        )
    write_section(
        "faults",
        "\n".join(lines),
        [{"fault": fault, **asdict(row)} for fault, row in ROWS],
        page=RELIABILITY,
    )
