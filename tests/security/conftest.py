"""What is done to dray by whoever writes a spec, a folder of data, a model or a run: commands that
must refuse it in a line, and a small run that may be spoilt."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dray.cli import main
from tiny import tiny_tree

Refused = Callable[..., str]


@pytest.fixture
def home(tmp_path: Path, tiny_corpus: Path) -> Path:
    """A folder of a person's with a spec of one worker, and its texts."""
    shutil.copytree(tiny_corpus, tmp_path / "home" / "texts")
    tree = {**tiny_tree(Path("texts")), "resources": {"workers": 1}}
    (tmp_path / "home" / "spec.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "home"


@pytest.fixture
def refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Run a command, in an empty folder, that must be refused as a user's mistake: one line on
    standard error, nothing on standard output, no file written. The line."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        capsys.readouterr()
        before = _files(tmp_path)
        try:
            code: object = main(list(words))
        except SystemExit as error:  # of the parser
            code = error.code
        out, err = capsys.readouterr()
        assert code == 2, err
        assert out == ""
        assert len(err.splitlines()) == 1, err
        assert err.isprintable() or err.rstrip("\n").isprintable(), ascii(err)
        assert "not foreseen" not in err
        assert _files(tmp_path) == before
        return err

    return run


def _files(folder: Path) -> set[str]:
    """All that lies around the folder in which a command runs, one level above it included."""
    return {str(path) for path in folder.parent.rglob("*") if not path.is_dir()}


@pytest.fixture
def spec_file(tmp_path: Path, tiny_corpus: Path) -> str:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_tree(tiny_corpus)))
    return "tiny.yaml"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, local_ray: None) -> Path:
    """A storage with a corpus and a trained run, called `tiny`."""
    from dray.corpus.prepare import prepare
    from dray.spec import make_spec
    from dray.train import train_locally

    storage = tmp_path_factory.mktemp("trained")
    spec = make_spec(tiny_tree(tiny_corpus, duration={"steps": 4}))
    prepare(spec, str(storage))
    train_locally(spec, storage=str(storage))
    return storage


@pytest.fixture
def hostile(trained: Path, tmp_path: Path) -> Path:
    """A copy of that storage, to be spoilt."""
    return shutil.copytree(trained, tmp_path / "runs")
