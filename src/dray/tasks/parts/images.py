"""Images as tasks share them: from the bytes of a file to pixels of one size, and how pixels are
varied for training, each image by numbers of its own.

Pillow reads, torch moves. What is drawn depends on a step's number and an image's id alone, so
that a run that is taken up again elsewhere draws the same. Needs the extra `images`.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dray.errors import caught


def read_image(content: bytes, size: int, channels: int) -> npt.NDArray[np.uint8] | str:
    """The pixels of an image file, [size, size, channels], grey or red, green and blue, upright as
    its camera was held and stretched to the size; or, in a word or two, why there are none. What is
    transparent lies on white; of 16 bits the upper eight are kept."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    def read() -> npt.NDArray[np.uint8]:
        with Image.open(io.BytesIO(content)) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # `convert` would clip them
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            if upright.has_transparency_data:
                upright = Image.alpha_composite(
                    Image.new("RGBA", upright.size, "white"), upright.convert("RGBA")
                )
            upright = upright.convert("L" if channels == 1 else "RGB")
            sized = upright.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(sized, np.uint8).reshape(size, size, channels)

    pixels, error = caught(read)
    if pixels is not None:
        return pixels
    if isinstance(error, UnidentifiedImageError):
        return "no image"
    too_large = isinstance(error, Image.DecompressionBombError)
    return "too large an image" if too_large else "broken image"


@dataclass(frozen=True)
class Moves:
    """How far images are moved; 0 or empty: not at all."""

    rotate: float = 0.0
    """Degrees to either side."""
    shift: float = 0.0
    """Share of the side, along each axis, to either side."""
    shear: float = 0.0
    """Degrees to either side, along each axis."""
    zoom: float = 0.0
    """Share by which they grow or shrink."""
    crop: float = 1.0
    """Least share of the area that is cut out at some place, and made as large as the whole."""
    flip: Literal["none", "horizontal", "vertical", "both"] = "none"
    """Whether every second one is mirrored."""

    @property
    def are_none(self) -> bool:
        return self == Moves()


NUM_DRAWS = 12
"""Numbers that an image's moves take of its own."""


def move_images(images: Tensor, moves: Moves, drawn: npt.NDArray[np.float64]) -> Tensor:
    """Square images [rows, channels, side, side], each moved by its NUM_DRAWS numbers, all moves in
    one warp. Where nothing of an image is left its edge goes on."""
    if moves.are_none:
        return images
    numbers = torch.from_numpy(drawn).float()
    sides = numbers * 2 - 1  # to either side
    area = moves.crop + (1 - moves.crop) * numbers[:, 0]
    enlarged = area.rsqrt()
    turn, across, down = (
        torch.deg2rad(most * sides[:, place])
        for most, place in ((moves.rotate, 8), (moves.shear, 9), (moves.shear, 10))
    )
    ones = torch.ones(len(images))
    wanted = torch.tensor(
        [moves.flip in ("horizontal", "both"), moves.flip in ("vertical", "both")]
    )
    sign = torch.where((numbers[:, 2:4] < 0.5) & wanted, -1.0, 1.0)
    turned = _matrices(turn.cos(), -turn.sin(), turn.sin(), turn.cos())
    sheared = _matrices(ones, across.tan(), down.tan(), ones)
    size = (enlarged * (1 + moves.zoom * sides[:, 1]))[:, None, None]
    matrix = size * turned @ sheared @ torch.diag_embed(sign)
    # From -1 to 1 a side is 2 long. What is cut out lies within the image: its middle is off by at
    # most what is left on a side.
    shift = 2 * moves.shift * sides[:, 4:6] + (enlarged - 1)[:, None] * sides[:, 6:8]
    back = torch.linalg.inv(matrix)  # where what is seen comes from
    theta = torch.cat([back, -back @ shift[:, :, None]], dim=2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _matrices(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """[rows, 2, 2] of their elements, row by row."""
    return torch.stack([a, b, c, d], dim=1).view(-1, 2, 2)


def mix_pairs(
    images: Tensor,
    drawn: npt.NDArray[np.float64],
    *,
    mixup: float,
    cutmix: float,
) -> tuple[Tensor, Tensor]:
    """Images mixed with their neighbours (the first with the second, the third with the fourth …),
    and the share of each that is its own, [rows].

    `mixup` and `cutmix` are the parameter of the symmetric Beta distribution from which the share
    comes: of the brightness of all pixels (Zhang et al. 2018, arXiv:1710.09412), or of the area
    around a rectangle (Yun et al. 2019, arXiv:1905.04899); 0: not at all. Where both are wanted
    each pair is mixed by one of them. `drawn` [rows, 4]: a pair goes by its first row's.
    """
    from scipy.stats import beta

    height, width = images.shape[-2:]
    mixed, own = images.clone(), torch.ones(len(images))
    for first in range(0, len(images) - 1, 2):
        which, share, across, down = drawn[first].tolist()
        cuts = cutmix > 0 and (mixup <= 0 or which < 0.5)
        strength = cutmix if cuts else mixup
        kept = float(beta.ppf(share, strength, strength))
        pair, swapped = images[first : first + 2], images[[first + 1, first]]
        if not cuts:
            mixed[first : first + 2] = kept * pair + (1 - kept) * swapped
        else:
            side = math.sqrt(1 - kept)
            rows, columns = round(height * side), round(width * side)
            top, left = round((height - rows) * down), round((width - columns) * across)
            place = (..., slice(top, top + rows), slice(left, left + columns))
            mixed[first : first + 2][place] = swapped[place]
            kept = 1 - rows * columns / (height * width)
        own[first : first + 2] = kept
    return mixed, own
