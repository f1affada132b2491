"""Credentials in URIs: used by whoever was given them, and nowhere else to be found."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from dray import redaction
from dray.errors import DrayError, StoreError
from dray.redaction import redact, restored, take_in
from dray.runs import Run, create_run, fork_run, list_runs, open_or_create
from dray.spec import dump_spec, load_spec, make_spec
from dray.storage.filesystem import absolute, child, open_filesystem
from sharded_model import PLAN, make_test_spec, save

KEY, SECRET = "AKIDEXAMPLEKEY", "wJalrXUtnFEMIbPxRfiCY"


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))


@pytest.fixture
def keyed_storage(s3_endpoint: str, no_keys: None) -> str:
    return f"s3://{KEY}:{SECRET}@bucket/{uuid.uuid4().hex}/runs?{s3_endpoint}"


@pytest.mark.parametrize(
    ("place", "clean"),
    [
        (
            f"s3://{KEY}:{SECRET}@bucket/a?region=x&scheme=http",
            "s3://bucket/a?region=x&scheme=http",
        ),
        (
            f"s3://bucket/a?endpoint_override=localhost:9000&session_token={SECRET}",
            "s3://bucket/a?endpoint_override=localhost:9000",
        ),
        (f"s3://{KEY}:with/a/{SECRET}@bucket/a", "s3://bucket/a"),
        (f"s3://{KEY}:p@ss{SECRET}@bucket/a", "s3://bucket/a"),
        (
            f"abfs://box@account.dfs.core.windows.net/a?sv=2024-01-01&sp=racwdl&se=2027-01-01&sig={SECRET}%3D",
            "abfs://box@account.dfs.core.windows.net/a",
        ),
        (
            f"https://host/a.jsonl?X-Amz-Date=2026-11-26&X-Amz-Signature={SECRET}&versionId=3",
            "https://host/a.jsonl?versionId=3",
        ),
        (
            f"https://host/a.jsonl?Expires=1700000000&Signature={SECRET}&Key-Pair-Id=KEYPAIR",
            "https://host/a.jsonl",
        ),
        (f"https://{SECRET}@host/a.jsonl", "https://host/a.jsonl"),
        (f"sftp://me:{SECRET}@host:22/a", "sftp://host:22/a"),
        (f"hdfs://me:{SECRET}@/a", "hdfs:///a"),
        (
            f"postgresql+psycopg2://me:{SECRET}@db:5432/mlflow",
            "postgresql+psycopg2://db:5432/mlflow",
        ),
    ],
)
def test_credentials_are_split_off_and_come_back(place: str, clean: str) -> None:
    assert take_in(place) == clean
    assert absolute(place) == clean
    assert take_in(clean) == clean
    assert sorted(restored(clean).replace("?", "&").split("&")) == sorted(
        place.replace("?", "&").split("&")
    )
    (held,) = redaction._held.values()
    for value in (value for value in held.values() if len(value) > 5):
        assert value not in redact(f"cannot read {value}, {place}", {})
    assert SECRET in "".join(held.values())
    assert SECRET not in repr(redaction._held)
    harmless = "2026-11-26T12:00:00 me, 2027-01-01, 1700000000"
    assert redact(harmless, {}) == harmless


@pytest.mark.parametrize(
    "place",
    [
        "s3://bucket/a?region=x&endpoint_override=h:1&scheme=http&allow_bucket_creation=true",
        "/a/b?token=x",
        "hf://a/b",
        "gs://anonymous@bucket/a",
        "hdfs://me@node:8020/a",
        "abfs://box@account.dfs.core.windows.net/a",
        "hdfs:///a",
        "github://huggingface:datasets@main/a",
        "memory://a",
        "python:stdlib",
        "a: b://",
        "s3://bucket/*.jsonl?region=x",
        "https://host/a?versionId=3&se=4",
    ],
)
def test_what_is_no_credential_stays(place: str) -> None:
    assert take_in(place) == place
    assert restored(place) == place


def test_they_hold_below_their_place_and_nowhere_else() -> None:
    clean = take_in(f"s3://{KEY}:{SECRET}@bucket/texts/*.jsonl?region=x")
    for below in (
        clean,
        "s3://bucket/texts/a.jsonl",
        "s3://bucket/texts?region=x",
        child("s3://bucket/texts", "b"),
    ):
        assert f"{KEY}:{SECRET}@bucket" in restored(below)
    for beside in ("s3://bucket/texts2", "s3://bucket/", "s3://other/texts/a", "gs://bucket/texts"):
        assert restored(beside) == beside
    take_in(f"s3://{KEY}:nearer@bucket/texts/own")
    assert restored("s3://bucket/texts/own/a") == f"s3://{KEY}:nearer@bucket/texts/own/a"
    take_in("abfs://one@acct/x?sig=first")
    take_in("abfs://two@acct/x?sig=second")
    assert restored("abfs://one@acct/x/y") == "abfs://one@acct/x/y?sig=first"


def stored(storage: str) -> Iterator[bytes]:
    """Everything that lies in a storage."""
    from pyarrow import fs as pafs

    filesystem, path = open_filesystem(storage)
    for item in filesystem.get_file_info(pafs.FileSelector(path, recursive=True)):
        if item.type == pafs.FileType.File:
            with filesystem.open_input_file(item.path) as stream:
                yield item.path.encode() + stream.read()


def test_a_run_with_keys_in_its_uri_keeps_none(keyed_storage: str, tmp_path: Path) -> None:
    """Written, reopened, shown and forked by a caller that has the keys; records, pages and errors
    have none."""
    spec = make_test_spec(
        data={"train": f"{keyed_storage.replace('/runs', '/texts/*.jsonl')}"},
        tracking={"mlflow": f"http://me:{SECRET}@127.0.0.1:9"},
    )
    run = create_run(
        keyed_storage,
        "speeches",
        spec,
        PLAN,
        corpus=child(keyed_storage, "corpora", "a"),
        corpus_key="a",
    )
    run.log_metrics([{"step": 1, "attempt": run.begin_attempt(1, 0), "loss": 1.0}])
    save(run, 1)
    run.log_event("failed", error=f"cannot reach {keyed_storage}")
    run.set_status("failed", f"no answer from {keyed_storage}")
    again = Run.open(keyed_storage, "speeches")
    open_or_create(keyed_storage, "speeches", spec, PLAN)
    fork_run(keyed_storage, "speeches", "branch", make_test_spec(seed=1), PLAN)
    assert [found.name for found in list_runs(keyed_storage)] == ["speeches", "branch"]
    assert (
        again.record()["corpus"] == "corpora/a"
    )  # relative to the storage, which has no keys in it
    for text in (
        *stored(keyed_storage),
        json.dumps(again.summary()).encode(),
        again.uri.encode(),
        repr(again).encode(),
        repr(again.__reduce__()).encode(),
        repr(spec).encode(),
        dump_spec(spec).encode(),
    ):
        assert SECRET.encode() not in text
        assert KEY.encode() not in text
    assert restored(str(again.spec().tracking.mlflow)) == f"http://me:{SECRET}@127.0.0.1:9"


def test_a_record_of_an_earlier_version_is_cleaned(local_run: Run) -> None:
    path = Path(local_run.path, "run.json")
    old = json.loads(path.read_text())
    old["corpus"] = f"s3://{KEY}:{SECRET}@bucket/corpora/a?region=x"
    old["identity"]["data"]["train"][0]["path"] = [f"s3://{KEY}:{SECRET}@bucket/texts/*.jsonl"]
    path.write_text(json.dumps(old))
    assert local_run.record()["corpus"] == "s3://bucket/corpora/a?region=x"
    assert SECRET not in json.dumps(local_run.summary())
    assert restored(local_run.record()["corpus"]) == old["corpus"]
    # The spec that began it is the same one still, and what is written now is clean.
    tree = yaml.safe_load(dump_spec(local_run.spec()))
    tree["data"]["train"][0]["path"] = [f"s3://{KEY}:{SECRET}@bucket/texts/*.jsonl"]
    open_or_create(local_run.storage, "speeches", make_spec(tree), PLAN)
    local_run.set_status("completed")
    assert SECRET not in path.read_text() + Path(local_run.path, "spec.yaml").read_text()


@pytest.mark.parametrize(
    "place",
    [
        f"s3://{KEY}:{SECRET}@bucket/x?nonsense=1",
        f"nope://{KEY}:{SECRET}@x/y",
        f"s3://{KEY}:{SECRET}@/",
    ],
)
def test_errors_show_none(place: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_filesystem(place)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        f"data.train=s3://{KEY}:{SECRET}@bucket/a",
        f"data.train=[s3://{KEY}:{SECRET}@bucket/a, 3]",
        f"data.trian=s3://{KEY}:{SECRET}@bucket/a",
        f"DATA=s3://{KEY}:{SECRET}@bucket/a",
        f"data.train='s3://{KEY}:{SECRET}@bucket/a",
        f"tracking.mlflow={{a: 's3://{KEY}:{SECRET}@bucket'}}",
        f"seed=s3://{KEY}:{SECRET}@bucket/a",
    ],
)
def test_a_spec_shows_none(override: str) -> None:
    try:
        text = dump_spec(load_spec("quickstart", [override]))
    except DrayError as error:
        text = str(error)
    assert SECRET not in text


def test_commands_print_none(s3_endpoint: str) -> None:
    place = f"s3://{KEY}:{SECRET}@nobucket-{uuid.uuid4().hex}/x?{s3_endpoint}"
    done = subprocess.run(
        [sys.executable, "-m", "dray.cli", "show", "speeches", "--storage", place],
        capture_output=True,
        text=True,
        check=False,
    )
    assert SECRET not in done.stdout + done.stderr


def test_workers_ask_the_driver(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker process of Ray opens a clean place with what the driver took in, also if it was told
    late; neither the environment of workers nor their arguments hold it."""
    import ray

    @ray.remote(num_cpus=0)
    def opened(place: str) -> tuple[str, bool]:
        import os
        import time

        from dray.redaction import restored

        time.sleep(1.1)
        return restored(place), "wJalr" in str(os.environ)

    place = f"s3://bucket/{uuid.uuid4().hex}"
    assert ray.get(opened.remote(place)) == (place, False)
    take_in(place.replace("s3://", f"s3://{KEY}:{SECRET}@"))
    full = place.replace("s3://", f"s3://{KEY}:{SECRET}@")
    assert ray.get([opened.remote(place), opened.remote(f"{place}/a?region=x")]) == [
        (full, False),
        (f"{full}/a?region=x", False),
    ]
    redaction.forget_shared_credentials()
