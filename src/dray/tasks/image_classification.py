"""Classes of images: files in folders of one class each, bytes in parquet, or MNIST's IDX files.

A row is an image of one size, as pixels; it counts as one token. Training may see it turned,
shifted, sheared, zoomed, cropped, mirrored or mixed with its neighbour, by numbers that belong to
the step and the image. Validation sees it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field as Limits

from dray.spec import Direction, Field, Head
from dray.spec.sections import Float, Int, Section
from dray.tasks.rows import IGNORED, Column
from dray.tasks.task import Batch, Output, Task, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor, nn

    from dray.tasks.parts.images import Moves
    from dray.tasks.rows import Encoded, Tools

Share = Annotated[Float, Limits(ge=0, lt=1)]
Degrees = Annotated[Float, Limits(ge=0, le=180)]
Strength = Annotated[Float, Limits(ge=0, le=100)]


class ImageClassification(Task):
    """Prediction of an image's class."""

    class Settings(Section):
        """How images are made alike, and how they are varied for training."""

        size: Annotated[Int, Limits(ge=8, le=4096)] = 224
        """Height and width to which images are stretched, in pixels."""
        channels: Literal[1, 3] = 3
        """1: grey; 3: red, green and blue."""
        mean: Annotated[Float, Limits(ge=0, le=1)] = 0.5
        """What is taken off pixels of 0 to 1."""
        deviation: Annotated[Float, Limits(gt=0, le=1)] = 0.5
        """What they are divided by then."""
        rotate: Degrees = 0.0
        """Training turns images by up to so many degrees."""
        shift: Share = 0.0
        """Training shifts them by up to this share of their side, along each axis."""
        shear: Annotated[Float, Limits(ge=0, le=80)] = 0.0
        """Training shears them by up to so many degrees, along each axis."""
        zoom: Share = 0.0
        """Training makes them larger or smaller by up to this share."""
        crop: Annotated[Float, Limits(gt=0, le=1)] = 1.0
        """Training cuts out at least this share of the area, and makes it as large as the whole."""
        flip: Literal["none", "horizontal", "vertical", "both"] = "none"
        """Training mirrors every second image."""
        mixup: Strength = 0.0
        """Training mixes each image with its neighbour in the step, label and all, by a share from
        the Beta distribution with this parameter; 0: none."""
        cutmix: Strength = 0.0
        """As `mixup`, but a rectangle is the neighbour's. Where both are wanted, half of the pairs
        get each."""

    name = "image_classification"
    tokenizes = False
    fixed_tokens = 1
    predicts = True
    serves = ("classify",)
    fields: Mapping[str, Field] = {"image": Field("bytes"), "label": Field("label")}
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
        self.columns = (
            Column("pixels", "uint8", shape=self._shape),
            Column("label", names=True),
        )
        self.rows_together = 2 if self.settings.mixup or self.settings.cutmix else 1

    @property
    def row_settings(self) -> dict[str, Any]:
        return {"task": self.name, "version": self.version, "shape": self._shape}

    @property
    def model_options(self) -> Mapping[str, Any]:
        return {"image_size": self.settings.size, "num_channels": self.settings.channels}

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (self.settings.size, self.settings.size, self.settings.channels)

    @property
    def _moves(self) -> Moves:
        from dray.tasks.parts.images import Moves

        names = ("rotate", "shift", "shear", "zoom", "crop", "flip")
        return Moves(**{name: getattr(self.settings, name) for name in names})

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        """Files as pixels of one size; what is no image is refused."""
        import numpy as np
        import pyarrow as pa

        from dray.tasks.parts.encoding import read_bytes, with_columns
        from dray.tasks.parts.images import read_image
        from dray.tasks.rows import Encoded

        size, channels = self.settings.size, self.settings.channels
        found = [read_image(content, size, channels) for content in read_bytes(texts)]
        refused = {place: image for place, image in enumerate(found) if isinstance(image, str)}
        images = [image for image in found if not isinstance(image, str)]
        records = np.array([n for n in range(len(found)) if n not in refused], np.int64)
        pixels = np.stack(images) if images else np.empty((0, *self._shape), np.uint8)
        encoded = Encoded(
            np.empty(0, tools.dtype),
            np.ones(len(images), np.int64),
            {"pixels": pixels},
            records=records,
            refused=refused,
        )
        if targets is None:
            return encoded
        return with_columns(encoded, label=tools.number(targets.take(pa.array(records))))

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`pixel_values` [rows, channels, size, size], fp32, and `labels` [rows], int64; padding
        rows are IGNORED."""
        from dray.tasks.parts.columns import array_column, integer_column, real_rows

        pixels = array_column(table, "pixels", self._shape).permute(0, 3, 1, 2).float() / 255
        labels = integer_column(table, "label").masked_fill(~real_rows(table), IGNORED)
        values = (pixels - self.settings.mean) / self.settings.deviation
        return {"pixel_values": values.contiguous(), "labels": labels}

    def vary(self, batch: Batch, table: pa.Table, draw: int) -> Batch:
        """The images moved and mixed; of mixed ones also `other_labels` and `own_share`, [rows]."""
        from dray.tasks.parts.columns import drawn_by_row
        from dray.tasks.parts.images import NUM_DRAWS, mix_pairs, move_images

        drawn = drawn_by_row(table, draw, NUM_DRAWS + 4)
        images = move_images(batch["pixel_values"], self._moves, drawn[:, :NUM_DRAWS])
        if self.rows_together == 1:
            return {**batch, "pixel_values": images}
        mixup, cutmix = self.settings.mixup, self.settings.cutmix
        mixed, own = mix_pairs(images, drawn[:, NUM_DRAWS:], mixup=mixup, cutmix=cutmix)
        others = _neighbours(batch["labels"])
        return {
            "pixel_values": mixed,
            "labels": batch["labels"],
            "other_labels": others,
            "own_share": own,
        }

    def model_inputs(self, num_rows: int, num_tokens: int) -> Batch:
        import torch

        size, channels = self.settings.size, self.settings.channels
        return {"pixel_values": torch.zeros(num_rows, channels, size, size)}

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

    def save_processor(self, folder: str) -> None:
        """`preprocessor_config.json`, by which AutoImageProcessor makes the pixels that training
        had."""
        from transformers import ViTImageProcessorPil

        own = self.settings
        ViTImageProcessorPil(
            size={"height": own.size, "width": own.size},
            image_mean=[own.mean] * own.channels,
            image_std=[own.deviation] * own.channels,
            do_convert_rgb=own.channels == 3,
        ).save_pretrained(folder)


def _neighbours(values: Tensor) -> Tensor:
    """Each value's neighbour: the first has the second, the second the first, and so on."""
    return values.reshape(-1, 2).flip(1).reshape(-1)
