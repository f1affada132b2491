"""IDX files, as MNIST and its kin have them: an array of bytes behind a few numbers that say its
shape, images in one file and their labels in another beside it.

Images become files of their own (PGM, PPM), as which any other image comes. Refuses arrays of
anything but bytes.
"""

from __future__ import annotations

import math
import struct

import numpy as np
import numpy.typing as npt

COLUMNS = ("image", "label")
_BYTES = 8
"""The type of an array of unsigned bytes."""
_RENAMED = (("images", "labels"), ("idx3", "idx1"), ("idx4", "idx1"))
"""What the name of a file of labels has in place of what that of its images has."""


def parse_idx(data: bytes) -> npt.NDArray[np.uint8]:
    """The array that a file holds: labels [number], grey images [number, height, width] or coloured
    ones [number, height, width, 3]. Raises ValueError for what is no such file, or not all of
    one."""
    if len(data) < 4 or data[:2] != b"\0\0":
        raise ValueError("no IDX file: it begins with no two zeros")
    kind, num_dimensions = data[2], data[3]
    begin = 4 + 4 * num_dimensions
    if kind != _BYTES or num_dimensions not in (1, 3, 4) or len(data) < begin:
        raise ValueError(f"an IDX file of type {kind} with {num_dimensions} dimensions")
    shape = struct.unpack(f">{num_dimensions}I", data[4:begin])
    if num_dimensions == 4 and shape[3] != 3:
        raise ValueError(f"images of {shape[3]} channels")
    if len(data) != begin + math.prod(shape):
        raise ValueError(f"{len(data) - begin:,} bytes, where {math.prod(shape):,} are declared")
    return np.frombuffer(data, np.uint8, offset=begin).reshape(shape)


def path_of_labels(path: str) -> str:
    """Where the labels of a file of images lie; the path itself if its name is not one of
    images."""
    folder, slash, name = path.rpartition("/")
    for images, labels in _RENAMED:
        name = name.replace(images, labels)
    return f"{folder}{slash}{name}"


def make_image_file(pixels: npt.NDArray[np.uint8]) -> bytes:
    """An image [height, width] or [height, width, 3] as a file that every reader of images
    knows."""
    height, width = pixels.shape[:2]
    return b"P%d %d %d 255\n" % (5 if pixels.ndim == 2 else 6, width, height) + pixels.tobytes()
