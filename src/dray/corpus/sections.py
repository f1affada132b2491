"""Files of sections: what one piece of work leaves for each of many others, read by range, one
section at a time.

A section is an array of records of one kind. The file begins with where each section begins and
ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pyarrow import fs as pafs

from dray.storage.filesystem import make_folder, open_whole

Records = npt.NDArray[np.void]


def write_sections(filesystem: pafs.FileSystem, path: str, sections: Sequence[Records]) -> None:
    """Write the sections, which share a kind, as one file. The folder is made."""
    make_folder(filesystem, path.rpartition("/")[0])
    bounds = np.cumsum([0, *(len(section) for section in sections)], dtype=np.int64)
    with open_whole(filesystem, path, durable=False) as stream:
        stream.write(bounds.tobytes())
        for section in sections:
            if len(section):
                stream.write(np.ascontiguousarray(section).view(np.uint8).data)


def read_section(
    filesystem: pafs.FileSystem, path: str, index: int, num_sections: int, kind: np.dtype[Any]
) -> Records:
    """One section of a file that holds `num_sections` of records of a kind."""
    with filesystem.open_input_file(path) as file:
        start, stop = np.frombuffer(file.read_at(16, index * 8), np.int64).tolist()
        data = file.read_at(
            (stop - start) * kind.itemsize, (num_sections + 1) * 8 + start * kind.itemsize
        )
        return np.frombuffer(data, kind)


def read_sections(
    filesystem: pafs.FileSystem, path: str, num_sections: int, kind: np.dtype[Any]
) -> list[Records]:
    """All sections of a file."""
    with filesystem.open_input_stream(path) as stream:
        data = stream.read()
    bounds = np.frombuffer(data, np.int64, num_sections + 1)
    records = np.frombuffer(data, kind, offset=bounds.nbytes)
    return np.split(records, bounds[1:-1].tolist())
