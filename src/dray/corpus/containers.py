"""What the first bytes of a file show it to be, whatever its name says: compressed, another
encoding, not data at all.

Names what it finds, so that a file that cannot be read says why. Decides nothing by a suffix.
"""

from __future__ import annotations

import re

import numpy as np

HEAD_BYTES = 64 * 1024
BOM = b"\xef\xbb\xbf"
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    **{b"BZh%d1AY&SY" % level: "bzip2" for level in range(1, 10)},
    **{
        bytes([0x50 + nth]) + b"\x2a\x4d\x18": "zstd" for nth in range(16)
    },  # frames that are skipped
}
ENCODINGS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
FOREIGN = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x1f\x9d": "compressed by `compress`",
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3\x00": "an SQLite database",
    b"%PDF-": "a PDF",
    b"\x93NUMPY": "a numpy array",
    b"\xd0\xcf\x11\xe0": "an Office document",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}
_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/[^\n]*\n(?:.*\n)*?size (\d+)")
_ARRAY = re.compile(rb"\s*\[\s*(?:\{|\]|$)")


def find_compression(head: bytes) -> str:
    """gzip, zstd, bzip2, xz or zip by the first bytes; empty for anything else."""
    return next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), "")


def find_pointer(head: bytes) -> int | None:
    """The size of the file that a git-LFS pointer stands for; none if the content is no pointer."""
    match = _POINTER.match(head)
    return int(match[1]) if match else None


def name_foreign(head: bytes) -> str:
    """What content with these first bytes is if it is no UTF-8 text, and the way out; empty if it
    may be text."""
    for magic, name in ENCODINGS.items():
        if head.startswith(magic):
            return f"{name}, where UTF-8 is read; convert it: iconv -f {name} -t UTF-8"
    compression = find_compression(head)
    if compression:
        return f"{compression} inside, compressed twice; unpack it"
    for magic, name in FOREIGN.items():
        if head.startswith(magic):
            return f"{name}, where text is read; unpack or convert it"
    if head[257:262] == b"ustar":
        return "a tar archive, where text is read; unpack it"
    return _name_wide(head)


def _name_wide(head: bytes) -> str:
    """UTF-16 without a byte order mark shows as null bytes in every second place of western
    text."""
    pairs = np.frombuffer(head[: len(head) // 2 * 2], np.uint8).reshape(-1, 2) == 0
    if len(pairs) < 8:
        return ""
    first, second = pairs.mean(axis=0)
    if max(first, second) > 0.4 and min(first, second) < 0.1:
        name = "UTF-16LE" if second > first else "UTF-16BE"
        return (
            f"{name} by its null bytes, where UTF-8 is read; convert it: iconv -f {name} -t UTF-8"
        )
    return ""


def is_array(head: bytes) -> bool:
    """Whether JSON content is one array of objects, rather than an object a line."""
    return _ARRAY.match(head) is not None


def is_text(head: bytes) -> bool:
    """Whether the bytes may be the beginning of UTF-8 text."""
    try:
        head.decode()
    except UnicodeDecodeError as error:
        return b"\0" not in head and error.start > len(head) - 4
    return b"\0" not in head


def ends_lines_otherwise(head: bytes) -> bool:
    """Whether the lines of text end with carriage returns alone, as on old Macintoshes."""
    return b"\n" not in head and head.rstrip(b"\r").count(b"\r") > 1
