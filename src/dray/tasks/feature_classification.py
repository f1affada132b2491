"""Classes of rows of numbers: columns of a table, signals, or images as so many numbers, after
transforms that are fitted to the training documents once.

A row is `size` numbers, or what the transforms leave of them; the model reads them as an image of
one line, a patch of it at each position. It counts as one token.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field as Limits
from pydantic import model_validator

from dray.spec import Direction, Field, Head
from dray.spec.sections import Int, Section
from dray.tasks.rows import IGNORED, Column
from dray.tasks.task import Batch, Output, Task, TaskMetrics

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from torch import nn

    from dray.tasks.rows import Encoded, Tools

MOST_NUMBERS = 1_000_000
_KEEPS = ("pca", "truncated_svd", "fourier", "wavelet")


class Transform(Section):
    """What becomes of rows of numbers."""

    name: Literal["standardize", "pca", "truncated_svd", "fourier", "wavelet"]
    """standardize: each number less its mean, over its standard deviation. pca, truncated_svd: the
    numbers along the directions in which they vary most; truncated_svd leaves their means in, so
    that zeros stay zeros. fourier: strengths of frequencies. wavelet: coefficients of a wavelet
    transform. The last two go along both axes of images."""
    keep: Annotated[Int, Limits(ge=1)] | None = None
    """How many numbers are left: of pca and truncated_svd the first directions; of fourier and
    wavelet the coefficients whose mean square is greatest. All but standardize need it."""
    whiten: bool = False
    """pca: whether each direction is brought to a variance of 1."""
    wavelet: str = "haar"
    """Which, by PyWavelets' names: haar, db4, sym5 and others."""
    levels: Annotated[Int, Limits(ge=1, le=30)] | None = None
    """wavelet: how often the coarse half is parted again; none: as often as the row is long enough
    for."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.name in _KEEPS) != (self.keep is not None):
            rule = "needs `keep`" if self.keep is None else "keeps all numbers, and takes no `keep`"
            raise ValueError(f"{self.name} {rule}")
        if self.whiten and self.name != "pca":
            raise ValueError(f"whiten is of pca, and this is {self.name}")
        if self.name != "wavelet" and (self.wavelet != "haar" or self.levels is not None):
            raise ValueError(f"wavelet and levels are of wavelet, and this is {self.name}")
        if self.name == "wavelet":
            _check_wavelet(self.wavelet)
        return self


def _check_wavelet(name: str) -> None:
    """Raise ValueError for a name that PyWavelets, where it is installed, does not know."""
    try:
        import pywt
    except ImportError:  # said when a corpus needs it
        return
    known = pywt.wavelist(kind="discrete")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"there is no wavelet {name!r}, but {', '.join(known[:6])} …{meant}")


class FeatureClassification(Task):
    """Prediction of the class of a row of numbers."""

    class Settings(Section):
        """Where the numbers are, and what becomes of them."""

        of: Literal["columns", "image"] = "columns"
        """What a record's numbers are: `columns` of it, each a number or a list of numbers, or the
        pixels of an `image`, 0 to 1."""
        columns: tuple[str, ...] = ()
        """Which, in this order."""
        size: Annotated[Int, Limits(ge=1, le=MOST_NUMBERS)] | None = None
        """How many numbers `columns` have together; none: one each. Of images: height and width to
        which they are stretched, in pixels; 28 by itself."""
        channels: Literal[1, 3] = 1
        """Of images. 1: grey; 3: red, green and blue."""
        transforms: tuple[Transform, ...] = (Transform(name="standardize"),)
        """Done one after the other, by what was fitted to a sample of the training documents."""
        patch: Annotated[Int, Limits(ge=1)] = 1
        """Numbers at each position of the model; all that are left must be a multiple of it."""

        @model_validator(mode="after")
        def _together(self) -> Self:
            if (self.of == "columns") != bool(self.columns):
                raise ValueError(
                    "columns names none: which columns hold the numbers?"
                    if self.of == "columns"
                    else f"columns are of columns, and of = {self.of}"
                )
            if len(set(self.columns)) != len(self.columns):
                raise ValueError("columns names one twice")
            if "label" in self.columns:
                raise ValueError("columns names `label`, which is what the class is called")
            if self.of == "columns" and self.size is not None and self.size < len(self.columns):
                raise ValueError(f"size = {self.size}: {len(self.columns)} columns have more")
            if self.of == "columns" and self.channels != 1:
                raise ValueError("channels are of images")
            if self.num_left % self.patch:
                raise ValueError(
                    f"patch = {self.patch}: {self.num_left} numbers are left, no multiple of it"
                )
            return self

        @property
        def shape(self) -> tuple[int, ...]:
            """Of a record's numbers before they are transformed."""
            if self.of == "image":
                side = self.size or 28
                return (side, side, self.channels)
            return (self.size or len(self.columns),)

        @property
        def num_left(self) -> int:
            """Numbers of a row after the transforms."""
            kept = [one.keep for one in self.transforms if one.keep is not None]
            if kept:
                return kept[-1]
            size = 1
            for side in self.shape:
                size *= side
            return size

    name = "feature_classification"
    tokenizes = False
    fixed_tokens = 1
    fits = True
    predicts = True
    serves = ("classify",)
    metrics: Mapping[str, Direction] = {
        "loss": "lower",
        "accuracy": "higher",
        "top5": "higher",
        "precision": "higher",
        "recall": "higher",
        "f1": "higher",
    }
    head = Head(
        "AutoModelForImageClassification",
        over="labels",
        each="row",
        problem_type="single_label_classification",
    )

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        of_image = self.settings.of == "image"
        columns = {name: Field("record", column=name) for name in self.settings.columns}
        document = {"image": Field("bytes")} if of_image else columns
        self.fields: Mapping[str, Field] = {**document, "label": Field("label")}
        self.columns = (
            Column("values", "float32", shape=(self.settings.num_left,)),
            Column("label", names=True),
        )

    @property
    def row_settings(self) -> dict[str, Any]:
        """What the model is given at each position changes no row."""
        own = self.settings.model_dump(mode="json", exclude={"patch"})
        return {"task": self.name, "version": self.version, **own}

    @property
    def model_options(self) -> Mapping[str, Any]:
        return {
            "image_size": [1, self.settings.num_left],
            "patch_size": [1, self.settings.patch],
            "num_channels": 1,
        }

    @property
    def remarks(self) -> Sequence[str]:
        return (
            "It takes numbers that are transformed already (`pixel_values`, [rows, 1, 1, numbers]);"
            " `dray predict` transforms records, by what dray-corpus.json keeps.",
        )

    def fit(self, texts: pa.Array) -> tuple[dict[str, Any], ...]:
        """What each transform takes from a sample of documents."""
        from dray.tasks.parts.transforms import fit_transforms

        values, _ = self._read(texts)
        return fit_transforms(self.settings.transforms, values, "task.transforms")

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        """Records as transformed numbers; those that are no such numbers are refused."""
        import numpy as np
        import pyarrow as pa

        from dray.tasks.parts.encoding import with_columns
        from dray.tasks.parts.transforms import apply_transforms
        from dray.tasks.rows import Encoded

        values, refused = self._read(texts)
        records = np.array([n for n in range(len(texts)) if n not in refused], np.int64)
        encoded = Encoded(
            np.empty(0, tools.dtype),
            np.ones(len(records), np.int64),
            {"values": apply_transforms(self.settings.transforms, self.fitted, values)},
            records=records,
            refused=refused,
        )
        if targets is None:
            return encoded
        return with_columns(encoded, label=tools.number(targets.take(pa.array(records))))

    def _read(self, texts: pa.Array) -> tuple[npt.NDArray[np.float64], dict[int, str]]:
        """The numbers of documents, [those that have them, *shape], and why others have none."""
        import numpy as np

        from dray.tasks.parts.encoding import read_bytes, read_numbers

        own = self.settings
        found: list[Any]
        if own.of == "image":
            from dray.tasks.parts.images import read_image  # needs an extra

            found = [read_image(one, own.shape[0], own.channels) for one in read_bytes(texts)]
        else:
            found = [read_numbers(text, own.shape[0]) for text in texts.to_pylist()]
        refused = {place: one for place, one in enumerate(found) if isinstance(one, str)}
        kept = [one for one in found if not isinstance(one, str)]
        values = np.stack(kept) if kept else np.empty((0, *own.shape))
        return values / (255.0 if own.of == "image" else 1.0), refused

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`pixel_values` [rows, 1, 1, numbers], fp32, and `labels` [rows], int64; padding rows are
        IGNORED."""
        from dray.tasks.parts.columns import array_column, integer_column, real_rows

        labels = integer_column(table, "label").masked_fill(~real_rows(table), IGNORED)
        values = array_column(table, "values", (1, 1, self.settings.num_left))
        return {"pixel_values": values, "labels": labels}

    def model_inputs(self, num_rows: int, num_tokens: int) -> Batch:
        import torch

        return {"pixel_values": torch.zeros(num_rows, 1, 1, self.settings.num_left)}

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.mixed_labels import MixedLabelLoss

        return MixedLabelLoss(model, ["pixel_values"], label_smoothing)

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.parts.mixed_labels import ConfusionMetrics

        return ConfusionMetrics(self.labels)

    def predictions(self, batch: Batch, output: Output) -> list[Any]:
        """The likeliest class, and the probability of each."""
        from dray.tasks.parts.mixed_labels import likeliest

        return likeliest(output, self.labels)
