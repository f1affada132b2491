"""Secrets in every way in which a person may give one, and then everything that is kept or shown is
searched for them: storage, logs of jobs, what the server of jobs knows, Ray's own logs, reports,
and what the commands say."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml
from pyarrow import fs as pafs

import dray as package
from dray.storage.filesystem import open_filesystem
from heads import Head, dray, environment, started_head
from tiny import tiny_tree

INJECTED = Path(__file__).parents[1] / "faults" / "injected"
SOURCE = Path(package.__file__).parents[1]
CANARY = "CaNaRy7"
"""In each of the secrets, which are otherwise as the real ones are."""
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": f"wJalr{CANARY}env/K7MDENG",
    "HF_TOKEN": f"hf_{CANARY}huggingfacehuggingface",
    "WANDB_API_KEY": f"{CANARY}wandb0123456789abcdef",
    "MLFLOW_TRACKING_USERNAME": "me",
    "MLFLOW_TRACKING_PASSWORD": f"{CANARY}mlflow",
    "AWS_EC2_METADATA_DISABLED": "true",
    "WANDB_MODE": "disabled",
}
URI_SECRET = f"in%2Fa%2BURI{CANARY}"


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names what is to go wrong (`tests/faults/injected`)."""
    return tmp_path_factory.mktemp("faults") / "named"


@pytest.fixture(scope="module")
def head(faults: Path) -> Iterator[Head]:
    """Its nodes have credentials in their environment, as clouds and clusters give them."""
    variables = SECRETS | {
        "PYTHONPATH": f"{INJECTED}:{SOURCE}",
        "DRAY_FAULT_FILE": str(faults),
    }
    with started_head(num_cpus=3, variables=variables) as found:
        yield found


class Searched:
    """All that was said and kept, by where."""

    def __init__(self) -> None:
        self.texts: dict[str, bytes] = {}

    def add(self, where: str, content: str | bytes) -> None:
        self.texts[where] = content.encode() if isinstance(content, str) else content

    def add_folder(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                self.add(str(path), path.read_bytes())

    def add_storage(self, uri: str) -> None:
        filesystem, place = open_filesystem(uri)
        for item in filesystem.get_file_info(pafs.FileSelector(place, recursive=True)):
            if item.type == pafs.FileType.File:
                with filesystem.open_input_file(item.path) as stream:
                    self.add(item.path, stream.read())

    def found(self, secrets: Iterable[str]) -> list[str]:
        wanted = [secret.encode() for secret in secrets]
        return [
            f"{where}: {text[max(0, text.find(secret) - 100) :][:200]!r}"
            for where, text in self.texts.items()
            for secret in wanted
            if secret in text
        ]


@pytest.mark.slow
def test_no_secret_is_kept_or_shown_anywhere(
    tmp_path: Path, tiny_corpus: Path, head: Head, faults: Path, s3_endpoint: str
):
    home = tmp_path / "home"
    shutil.copytree(tiny_corpus, home / "texts")
    tree = {
        **tiny_tree(Path("texts")),
        "resources": {"workers": 1},
        "tracking": {"tensorboard": True, "wandb": "canary"},
    }
    (home / "spec.yaml").write_text(yaml.safe_dump(tree))
    place = f"bucket/{uuid.uuid4().hex}/runs?{s3_endpoint}"
    searched = Searched()

    def run(code: int, *words: str, **variables: str) -> str:
        done = dray(home, head.token, *words, **{**SECRETS, **variables})
        name = " ".join(words[:3])
        searched.add(f"standard output of {name}", done.stdout)
        searched.add(f"standard error of {name}", done.stderr)
        assert done.returncode == code, (words, done.stderr)
        return done.stdout + done.stderr

    # The environment of the nodes opens the storage; the command holds nothing.
    submitted = ["submit", "train", "spec.yaml", "--storage", f"s3://{place}"]
    submitted += ["--address", head.jobs]
    run(0, *submitted, "--run", "good")
    faults.write_text("dray.rank.loop:_Loop._forward_backward:before:always:leak")
    told = run(3, *submitted, "--run", "leaking")
    assert "***" in told  # it has said what failed, and hidden what was in it
    faults.write_text("")

    # A URI with its own key, for a storage and for data; a tracker's URI with a password.
    keyed = f"s3://AKIDEXAMPLEKEYOWN:{URI_SECRET}@{place}"
    mlflow = f"tracking.mlflow=http://me:{URI_SECRET}@127.0.0.1:9/x"
    words = ["train", "spec.yaml", "--storage", keyed, "--address", head.address]
    run(0, *words, "--run", "keyed", mlflow)
    faults.write_text(f"dray.rank.loop:_Loop._forward_backward:before:{tmp_path}/flag:leak")
    run(0, *words, "--run", "keyed-leaking")  # once, and then it goes on
    faults.write_text("")
    run(2, *words, "--run", "none", f"data.train=s3://AKIDEXAMPLEKEYOWN:{URI_SECRET}@bucket/none/x")
    run(2, *submitted, f"data.train=s3://AKIDEXAMPLEKEYOWN:{URI_SECRET}@bucket/none/x")

    for name in ("leaking", "keyed-leaking"):
        for command in ("show", "doctor"):
            run(0, command, name, "--storage", keyed)
            run(0, command, name, "--storage", keyed, "--json")
        run(0, "report", name, "--storage", keyed, "--out", f"{name}.html")
    run(0, "verify", "keyed", "--storage", keyed)
    run(0, "runs", "--storage", keyed)
    run(0, "runs", "--address", head.jobs, "--json")

    searched.add_folder(home)
    searched.add_storage(f"s3://{place}")
    searched.add_folder(head.folder / "r")
    _add_jobs(searched, head)
    assert any("failures" in where for where in searched.texts)
    assert any("logs/a0001-r00000.log" in where for where in searched.texts)
    assert any("job-driver" in where for where in searched.texts)
    secrets = [CANARY, head.token.read_text()]
    assert "\n".join(searched.found(secrets)) == ""


def _add_jobs(searched: Searched, head: Head) -> None:
    """What the server of jobs tells of all jobs, and their logs."""
    import subprocess
    import sys

    code = (
        "import json, sys\n"
        "from ray.job_submission import JobSubmissionClient\n"
        "client = JobSubmissionClient(sys.argv[1])\n"
        "for job in client.list_jobs():\n"
        "    print(job, client.get_job_logs(job.submission_id) if job.submission_id else '')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, head.jobs],
        env=environment(head.token, RAY_AUTH_MODE="token"),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "dray_run" in done.stdout
    searched.add("the server of jobs", done.stdout)


def test_the_search_finds_what_is_there(tmp_path: Path):
    searched = Searched()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.log").write_text(json.dumps({"key": SECRETS["HF_TOKEN"]}))
    searched.add_folder(tmp_path)
    assert re.match(r".*b\.log: ", searched.found([CANARY])[0])
