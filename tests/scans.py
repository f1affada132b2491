"""A task whose documents are no texts: grey images (PGM) of any size, as a package outside dray
would have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dray.spec import Direction, Field, Head
from dray.tasks import Task
from dray.tasks.parts.encoding import join_lists, read_bytes, with_columns
from dray.tasks.rows import Column, Encoded, Tools

SIDE = 4


def make_pgm(pixels: npt.NDArray[np.uint8]) -> bytes:
    """An image [height, width] as a file."""
    height, width = pixels.shape
    return b"P5 %d %d 255\n" % (width, height) + pixels.tobytes()


def read_pgm(content: bytes) -> npt.NDArray[np.uint8] | None:
    """The image that a file holds; None if it is broken."""
    head, _, data = content.partition(b"\n")
    _, width, height, _ = head.split()
    if len(data) != int(width) * int(height):
        return None
    return np.frombuffer(data, np.uint8).reshape(int(height), int(width))


def thumbnail(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """SIDE × SIDE of its points, 0 to 1."""
    places = [np.arange(SIDE) * size // SIDE for size in pixels.shape]
    return pixels[np.ix_(*places)].astype(np.float32) / 255


class Scans(Task):
    """Which class an image is of."""

    name = "scans"
    fields: Mapping[str, Field] = {"image": Field("bytes"), "label": Field("label")}
    metrics: Mapping[str, Direction] = {"loss": "lower"}
    columns = (
        Column("pixels", dtype="uint8", varies=True),
        Column("size", shape=(2,)),
        Column("thumbnail", dtype="float32", shape=(SIDE, SIDE)),
        Column("label", names=True),
    )
    tokenizes = False
    head = Head("AutoModelForSequenceClassification", over="labels", each="row")

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        found = {nth: read_pgm(content) for nth, content in enumerate(read_bytes(texts))}
        refused = {nth: "broken image" for nth, image in found.items() if image is None}
        images = [image for image in found.values() if image is not None]
        records = np.array([nth for nth in found if nth not in refused], np.int64)
        encoded = Encoded(
            np.empty(0, tools.dtype),
            np.array([image.size for image in images], np.int64),
            {
                "pixels": join_lists([image.reshape(-1) for image in images]),
                "size": np.array([image.shape for image in images], np.int32),
                "thumbnail": np.array([thumbnail(image) for image in images]),
            },
            records=records,
            refused=refused,
        )
        if targets is None:
            return encoded
        return with_columns(encoded, label=tools.number(targets.take(pa.array(records))))


def scans_tree(paths: list[Any], **sections: Any) -> dict[str, Any]:
    """A spec of the task, as plain values."""
    sources = [
        {"path": str(path), "columns": {"image": "image"}, "label": "label"} for path in paths
    ]
    return {
        "name": "scans",
        "task": Scans(),
        "data": {
            "train": sources,
            "validation": {"share": 0.2},
            "sequence_tokens": 16,
        },
        "model": {"architecture": "bert", "hidden_size": 64, "num_layers": 2, "num_heads": 4},
        "duration": {"steps": 4},
        **sections,
    }
