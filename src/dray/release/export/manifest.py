"""What an exported folder is known by: `dray-manifest.json` lists every file with its bytes and its
SHA-256, and says which run and step it is of and what was checked.

A manifest may come from anybody: names that leave the folder, links, and what is no plain file are
refused and never opened. Imports no torch.
"""

from __future__ import annotations

import base64
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from dray.errors import StoreError, visible
from dray.release.export.signing import Signer, fingerprint, is_signed_by

MANIFEST, SIGNATURE = "dray-manifest.json", "dray-manifest.sig"
VERSION = 1
_MOST_BYTES = 64_000_000
_NAME = re.compile(r"[^\x00-\x1f\x7f/\\]+(/[^\x00-\x1f\x7f/\\]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FolderReport:
    """What `verify_folder` found."""

    folder: str
    ok: bool
    files: int = 0
    """Listed in the manifest."""
    bytes: int = 0
    signature: str = "none"
    """none, or `signed by SHA256:…`, or what is wrong with it."""
    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    additional: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """All that is wrong, in words."""
    format: str = ""
    run: str = ""
    step: int | None = None
    fingerprint: str = ""
    weights_sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write_manifest(folder: Path, told: Mapping[str, Any], signer: Signer | None) -> None:
    """Write the manifest of all files of a folder, with what is `told` besides, and its
    signature."""
    files = [
        {"file": name, "bytes": path.stat().st_size, "sha256": _digest(path)}
        for name, path in sorted(_plain_files(folder).items())
    ]
    tree = {"version": VERSION, **told, "files": files}
    if signer is not None:
        tree["signer"] = signer.to_json()
    content = (json.dumps(tree, indent=1, ensure_ascii=False) + "\n").encode()
    (folder / MANIFEST).write_bytes(content)
    if signer is not None:
        (folder / SIGNATURE).write_bytes(signer.sign(content))


def is_export(place: str) -> bool:
    """Whether a path is a folder that was exported, or was once."""
    return any(os.path.lexists(os.path.join(place, name)) for name in (MANIFEST, SIGNATURE))


def load_told(place: str) -> dict[str, Any]:
    """What the manifest of an exported folder says besides its files; nothing where it cannot be
    read, as `verify_folder` tells."""
    try:
        tree = json.loads(_read_plain(Path(place) / MANIFEST))
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: tree[key] for key in tree if key != "files"} if isinstance(tree, dict) else {}


def verify_folder(place: str, public_key: bytes | None = None) -> FolderReport:
    """Compare every file of an exported folder with its manifest, and the manifest with its
    signature.

    With a public key the manifest must be signed by it. Finds damage instead of raising.
    """
    folder = Path(place)
    try:
        content = _read_plain(folder / MANIFEST)
        tree = json.loads(content)
        listed = _listed(tree)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        return FolderReport(place, False, problems=[f"{MANIFEST} cannot be read ({reason})"])
    try:
        signature, complaint = _judge_signature(folder, tree, content, public_key)
        found, problems = _look(folder)
        missing = sorted(listed.keys() - found.keys())
        additional = sorted(found.keys() - listed.keys())
        changed = sorted(
            name
            for name in listed.keys() & found.keys()
            if not _is_same(found[name], *listed[name])
        )
    except (OSError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        return FolderReport(place, False, problems=[f"cannot be read ({error})"])
    problems = [
        *([complaint] if complaint else []),
        *problems,
        *(f"{name}: missing" for name in missing),
        *(f"{name}: not what was exported" for name in changed),
        *(f"{name}: was not exported" for name in additional),
    ]
    return FolderReport(
        place,
        not problems,
        len(listed),
        sum(size for size, _ in listed.values()),
        signature,
        missing,
        changed,
        additional,
        problems,
        **_told(tree),
    )


def _told(tree: Mapping[str, Any]) -> dict[str, Any]:
    texts = {
        name: str(tree.get(name) or "")
        for name in ("format", "run", "fingerprint", "weights_sha256")
    }
    step = tree.get("step")
    return {**texts, "step": step if isinstance(step, int) else None}


def _listed(tree: Any) -> dict[str, tuple[int, str]]:
    """(bytes, SHA-256) of each file. Raises ValueError for what is no manifest."""
    if not isinstance(tree, dict) or not isinstance(tree.get("files"), list):
        raise ValueError("it lists no files")
    if type(tree.get("version")) is not int or tree["version"] < 1:
        raise ValueError("it has no version")
    if tree["version"] > VERSION:
        raise ValueError(f"version {tree['version']} is newer than this dray's {VERSION}")
    listed: dict[str, tuple[int, str]] = {}
    for item in tree["files"]:
        if not isinstance(item, dict):
            raise ValueError("what it lists is no file")
        name, size, digest = (item.get(key) for key in ("file", "bytes", "sha256"))
        if not isinstance(name, str) or not is_inside(name):
            raise ValueError(f"{name!r} is no name of a file in the folder")
        if name in listed or name in (MANIFEST, SIGNATURE):
            raise ValueError(f"{name!r} is listed where it may not be")
        if type(size) is not int or size < 0 or not _SHA256.fullmatch(str(digest)):
            raise ValueError(f"{name!r} has no size and SHA-256")
        listed[name] = size, str(digest)
    return listed


def is_inside(name: str) -> bool:
    """Whether a name is that of a file below the folder it is said of, on any system."""
    if not _NAME.fullmatch(name) or re.match(r"[A-Za-z]:", name):
        return False
    return not any(part in (".", "..") for part in name.split("/"))


def _judge_signature(
    folder: Path, tree: Mapping[str, Any], content: bytes, public_key: bytes | None
) -> tuple[str, str]:
    """What the signature is, and what is wrong with it: empty if nothing is."""
    signer = tree.get("signer")
    has_file = os.path.lexists(folder / SIGNATURE)
    if signer is None and not has_file:
        wrong = "it is not signed, and --key says who should have" if public_key else ""
        return "none", wrong
    if signer is None or not has_file:
        wrong = (
            f"{SIGNATURE} is missing, and the manifest names who signed it"
            if signer is not None
            else f"{SIGNATURE} is there, and the manifest names nobody who signed it"
        )
        return "broken", wrong
    try:
        named = base64.b64decode(signer["public_key"], validate=True)
        signature = _read_plain(folder / SIGNATURE)
    except (OSError, ValueError, TypeError, KeyError) as error:
        return "broken", f"{SIGNATURE}: cannot be read ({error})"
    if public_key is not None and named != public_key:
        other = fingerprint(named)
        return f"by another key: {other}", (
            f"signed by another key: {other}, and --key is {fingerprint(public_key)}"
        )
    if not is_signed_by(named, signature, content):
        return "broken", f"{MANIFEST}: not what was signed"
    return f"signed by {fingerprint(named)}", ""


def _look(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The plain files of a folder but the manifest's own, by name, and what else is wrong in it:
    nothing is followed out of it."""
    found: dict[str, Path] = {}
    problems: list[str] = []
    left = [folder]
    while left:
        for entry in os.scandir(left.pop()):
            below = os.fsencode(Path(entry.path).relative_to(folder).as_posix())
            name = below.decode(errors="backslashreplace")
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                left.append(Path(entry.path))
            elif not stat.S_ISREG(mode):
                kind = "a link" if stat.S_ISLNK(mode) else "no plain file"
                problems.append(f"{name}: is {kind}, and an export has none")
            elif name not in (MANIFEST, SIGNATURE):
                found[name] = Path(entry.path)
    return found, sorted(problems)


def _plain_files(folder: Path) -> dict[str, Path]:
    found, problems = _look(folder)
    if problems:
        raise ValueError("; ".join(problems))
    return found


def _is_same(path: Path, size: int, digest: str) -> bool:
    return path.stat().st_size == size and _digest(path) == digest


def _open_plain(path: Path) -> Any:
    """A plain file's bytes; a link is not followed, and a pipe is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    stream = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        stream.close()
        raise ValueError(f"{path.name} is no plain file")
    return stream


def _read_plain(path: Path) -> bytes:
    with _open_plain(path) as stream:
        content: bytes = stream.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
    return content


def _digest(path: Path) -> str:
    with _open_plain(path) as stream:
        return file_digest(stream, sha256).hexdigest()


def format_report(report: FolderReport) -> str:
    """A report as lines for a person."""
    head = f"{report.folder}: "
    if report.run:
        head += f"{report.format}, step {report.step} of run {report.run}, "
    head += f"{report.files:,} files, {report.bytes:,} bytes"
    signature = {"none": "not signed"}.get(report.signature, report.signature)
    lines = [head, f"signature    {signature}"]
    if report.weights_sha256:
        lines.append(f"weights      sha256 {report.weights_sha256}")
    lines += [f"problem      {problem}" for problem in report.problems]
    lines.append("sound" if report.ok else "NOT what was exported")
    return "\n".join(map(visible, lines))
