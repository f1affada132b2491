"""An exported folder's manifest: what was changed, lost or added is named, whoever wrote the
manifest, and a signature is of one key."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dray.cli import main
from dray.errors import StoreError
from dray.release.export.manifest import (
    MANIFEST,
    SIGNATURE,
    is_inside,
    verify_folder,
    write_manifest,
)
from dray.release.export.signing import load_public_key, load_signer
from dray.release.export.staging import check_free, staged

TOLD = {"format": "folder", "run": "speeches", "step": 7, "fingerprint": "f", "weights_sha256": "w"}


def make_keys(folder: Path, name: str) -> tuple[str, str]:
    """Paths of a private and a public key."""
    from cryptography.hazmat.primitives import serialization as as_bytes
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(
        key.private_bytes(
            as_bytes.Encoding.PEM, as_bytes.PrivateFormat.PKCS8, as_bytes.NoEncryption()
        )
    )
    private.chmod(0o600)
    public.write_bytes(
        key.public_key().public_bytes(
            as_bytes.Encoding.PEM, as_bytes.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return str(private), str(public)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[str, str]:
    return make_keys(tmp_path, "ours")


@pytest.fixture
def folder(tmp_path: Path, keys: tuple[str, str]) -> Path:
    """A signed export of three files."""
    place = tmp_path / "model"
    (place / "deep").mkdir(parents=True)
    (place / "model.safetensors").write_bytes(b"\0" * 1000)
    (place / "config.json").write_text("{}")
    (place / "deep" / "more é.json").write_text("[]")
    write_manifest(place, TOLD, load_signer(keys[0]))
    return place


def verify(folder: Path, capsys: Any, *options: str) -> tuple[int, dict[str, Any]]:
    code = main(["verify", str(folder), "--json", *options])
    return code, json.loads(capsys.readouterr().out)


def test_a_sound_folder(folder: Path, keys: tuple[str, str], capsys: Any) -> None:
    code, found = verify(folder, capsys, "--key", keys[1])
    assert (code, found["ok"], found["files"], found["bytes"]) == (0, True, 3, 1004)
    assert found["signature"].startswith("signed by SHA256:")
    assert (found["run"], found["step"]) == ("speeches", 7)
    assert main(["verify", str(folder)]) == 0
    assert "signed by SHA256:" in capsys.readouterr().out


def _rewrite(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        tree = json.loads((folder / MANIFEST).read_text())
        change(tree)
        (folder / MANIFEST).write_text(json.dumps(tree))

    return harm


def _name_first(name: str) -> Callable[[Path], None]:
    return _rewrite(lambda tree: tree["files"][0].update(file=name))


def _replace_by_link(folder: Path) -> None:
    copy = folder.parent / "copy.json"
    shutil.move(folder / "config.json", copy)
    (folder / "config.json").symlink_to(copy)


def _replace_by_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def _link_a_folder(folder: Path) -> None:
    shutil.move(folder / "deep", folder.parent / "deep")
    (folder / "deep").symlink_to(folder.parent / "deep")


HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a byte": (
        lambda f: (f / "model.safetensors").write_bytes(b"\0" * 999 + b"\1"),
        "model.safetensors: not what was exported",
    ),
    "longer": (
        lambda f: (f / "config.json").write_text("{} "),
        "config.json: not what was exported",
    ),
    "lost": (lambda f: (f / "deep" / "more é.json").unlink(), "deep/more é.json: missing"),
    "added": (
        lambda f: (f / "modeling_evil.py").write_text(""),
        "modeling_evil.py: was not exported",
    ),
    "link": (_replace_by_link, "config.json: is a link"),
    "linked folder": (_link_a_folder, "deep: is a link"),
    "pipe": (_replace_by_pipe, "config.json: is no plain file"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "cannot be read"),
    "torn manifest": (lambda f: (f / MANIFEST).write_text('{"version": 1, "fi'), "cannot be read"),
    "empty manifest": (lambda f: (f / MANIFEST).write_text("[]"), "it lists no files"),
    "a manifest of words": (
        lambda f: (f / MANIFEST).write_text('{"version": 1, "files": ["a", 3]}'),
        "what it lists is no file",
    ),
    "no version": (
        lambda f: (f / MANIFEST).write_text('{"version": true, "files": []}'),
        "it has no version",
    ),
    "newer": (_rewrite(lambda t: t.update(version=9)), "version 9 is newer"),
    "above": (_name_first("../outside"), "is no name of a file in the folder"),
    "deep above": (_name_first("deep/../../outside"), "is no name of a file in the folder"),
    "absolute": (_name_first("/etc/passwd"), "is no name of a file in the folder"),
    "drive": (_name_first("C:x"), "is no name of a file in the folder"),
    "backslash": (_name_first("..\\outside"), "is no name of a file in the folder"),
    "itself": (_name_first(MANIFEST), "listed where it may not be"),
    "twice": (
        _rewrite(lambda t: t["files"].append(dict(t["files"][0]))),
        "listed where it may not be",
    ),
    "no size": (_rewrite(lambda t: t["files"][0].update(bytes=-1)), "no size and SHA-256"),
    "other step": (_rewrite(lambda t: t.update(step=8)), "not what was signed"),
    "unsigned": (lambda f: (f / SIGNATURE).unlink(), f"{SIGNATURE} is missing"),
    "nobody": (_rewrite(lambda t: t.pop("signer")), "names nobody who signed it"),
    "bad signer": (_rewrite(lambda t: t.update(signer=[1])), f"{SIGNATURE}: cannot be read"),
    "bad signature": (lambda f: (f / SIGNATURE).write_bytes(b"x"), "not what was signed"),
}


@pytest.mark.parametrize("harm", sorted(HARMS))
def test_what_was_done_to_it_is_named(folder: Path, harm: str, capsys: Any) -> None:
    do, said = HARMS[harm]
    do(folder)
    code, found = verify(folder, capsys)
    assert code == 3
    assert found["ok"] is False
    assert any(said in problem for problem in found["problems"]), found["problems"]
    assert main(["verify", str(folder)]) == 3
    assert said in capsys.readouterr().out


def test_whoever_makes_it_anew_has_not_the_key(
    folder: Path, keys: tuple[str, str], capsys: Any
) -> None:
    other, _ = make_keys(folder.parent, "theirs")
    for name in (MANIFEST, SIGNATURE):
        (folder / name).unlink()
    (folder / "config.json").write_text("evil")
    write_manifest(folder, TOLD, load_signer(other))
    assert verify(folder, capsys)[0] == 0  # whole, but signed by whom?
    code, found = verify(folder, capsys, "--key", keys[1])
    assert code == 3
    assert "signed by another key: SHA256:" in found["problems"][0]
    for name in (MANIFEST, SIGNATURE):
        (folder / name).unlink()
    write_manifest(folder, TOLD, None)
    assert verify(folder, capsys) == (0, verify(folder, capsys)[1])
    code, found = verify(folder, capsys, "--key", keys[1])
    assert code == 3
    assert "it is not signed" in found["problems"][0]


def test_keys_that_are_none(tmp_path: Path, keys: tuple[str, str]) -> None:
    private, public = keys
    os.chmod(private, 0o640)
    with pytest.raises(StoreError, match=r"others may read .* chmod 600"):
        load_signer(private)
    os.chmod(private, 0o600)
    with pytest.raises(StoreError, match="no private key"):
        load_signer(_private_copy(tmp_path, Path(public).read_bytes()))
    with pytest.raises(StoreError, match="cannot be read"):
        load_signer(str(tmp_path / "none.pem"))
    with pytest.raises(StoreError, match="no key"):
        load_signer(str(tmp_path))
    with pytest.raises(StoreError, match="no public key"):
        load_public_key(private)
    from cryptography.hazmat.primitives import serialization as as_bytes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    pem, kind = as_bytes.Encoding.PEM, as_bytes.PrivateFormat.PKCS8
    locked = ed25519.Ed25519PrivateKey.generate().private_bytes(
        pem, kind, as_bytes.BestAvailableEncryption(b"word")
    )
    with pytest.raises(StoreError, match="locked by a passphrase"):
        load_signer(_private_copy(tmp_path, locked))
    curve = ec.generate_private_key(ec.SECP256R1()).private_bytes(
        pem, kind, as_bytes.NoEncryption()
    )
    with pytest.raises(StoreError, match="no Ed25519 key"):
        load_signer(_private_copy(tmp_path, curve))


def _private_copy(folder: Path, content: bytes) -> str:
    path = folder / "copy.pem"
    path.touch(mode=0o600)
    path.write_bytes(content)
    return str(path)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_openssl_makes_keys_and_verifies(tmp_path: Path, capsys: Any) -> None:
    """The lines of docs/export.md."""

    def run(line: str) -> None:
        subprocess.run(line, shell=True, check=True, cwd=tmp_path, capture_output=True)

    run("openssl genpkey -algorithm ed25519 -out key.pem && chmod 600 key.pem")
    run("openssl pkey -in key.pem -pubout -out public.pem")
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text("{}")
    write_manifest(place, TOLD, load_signer(str(tmp_path / "key.pem")))
    assert verify(place, capsys, "--key", str(tmp_path / "public.pem"))[0] == 0
    run(
        "openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in model/dray-manifest.json "
        "-sigfile model/dray-manifest.sig"
    )


@pytest.mark.parametrize(
    ("name", "inside"),
    [("a", True), ("a/b.c", True), ("", False), ("a//b", False), ("a/", False), (".", False)],
)
def test_names_inside(name: str, inside: bool) -> None:
    assert is_inside(name) == inside


def test_what_is_no_export(tmp_path: Path, folder: Path, capsys: Any) -> None:
    (tmp_path / "plain").mkdir()
    assert main(["verify", str(tmp_path / "plain")]) == 2
    assert "neither a run nor an exported folder" in capsys.readouterr().err
    assert main(["verify", str(folder), "--ledger"]) == 2
    assert "is an exported folder" in capsys.readouterr().err
    assert main(["verify", "nothing", "--storage", str(tmp_path), "--key", "x.pem"]) == 2
    assert "is no exported folder" in capsys.readouterr().err


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"

    def fail() -> None:
        with staged("model", target) as staging:
            (staging / "half").write_text("")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(target.parent.iterdir()) == []
    with staged("model", target) as staging:
        (staging / "whole").write_text("1")
        assert not target.exists()
    assert (target / "whole").read_text() == "1"
    with pytest.raises(StoreError, match="nothing is overwritten"):
        check_free(str(target))
    with pytest.raises(StoreError, match="nothing is overwritten"), staged("model", target) as it:
        (it / "whole").write_text("2")
    assert (target / "whole").read_text() == "1"


def test_two_at_once_and_one_that_was_killed(tmp_path: Path) -> None:
    """What lives is left alone; what a SIGKILL left is removed."""
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from dray.release.export.staging import staged\n"
        "with staged('m', Path(sys.argv[1])) as it:\n"
        "    (it / 'half').write_text('x'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    target = tmp_path / "model"
    subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    (left,) = tmp_path.iterdir()
    assert (left / "whole" / "half").exists()
    with staged("model", target) as first:
        assert not left.exists()
        with staged("model", target) as second:
            assert first.exists()
            (second / "a").write_text("second")
        (first / "a").write_text("first")
        shutil.rmtree(target)
    assert (target / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_verifying_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from dray.cli import main\n"
        "assert main(['verify', sys.argv[1]]) == 0\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_manifest_that_is_a_link_is_not_followed(folder: Path) -> None:
    shutil.move(folder / MANIFEST, folder.parent / "manifest")
    (folder / MANIFEST).symlink_to(folder.parent / "manifest")
    report = verify_folder(str(folder))
    assert not report.ok
    assert "cannot be read" in report.problems[0]
