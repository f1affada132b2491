"""Images from files, moved and mixed; the loss and the metrics of mixed classes."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, top_k_accuracy_score
from torch import nn

from dray.tasks.parts.columns import draw_numbers
from dray.tasks.parts.images import (
    NUM_DRAWS,
    Moves,
    mix_pairs,
    move_images,
    read_image,
)
from dray.tasks.parts.mixed_labels import ConfusionMetrics, MixedLabelLoss
from dray.tasks.rows import IGNORED


def file_of(pixels: Any, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(out, form, **options)
    return out.getvalue()


def some_images(num: int = 6, size: int = 12) -> torch.Tensor:
    return torch.rand(num, 1, size, size, generator=torch.Generator().manual_seed(0))


def test_a_file_becomes_pixels_of_one_size() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8)
    same = read_image(file_of(pixels), 9, 3)
    assert np.array_equal(same, pixels)
    grey = read_image(file_of(pixels), 9, 1)
    assert np.array_equal(grey[..., 0], np.asarray(Image.fromarray(pixels).convert("L")))
    wide = np.zeros((10, 40), np.uint8)
    wide[:, 20:] = 255
    (half,) = {tuple(row) for row in read_image(file_of(wide), 8, 1)[..., 0].tolist()}
    assert half[:3] == (0, 0, 0)
    assert half[-3:] == (255, 255, 255)


def test_sixteen_bits_keep_their_greys_and_what_is_transparent_is_white() -> None:
    deep = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    out = io.BytesIO()
    Image.fromarray(deep).save(out, "PNG")
    assert np.array_equal(read_image(out.getvalue(), 8, 1)[..., 0], deep >> 8)
    shape = np.zeros((8, 8, 4), np.uint8)  # black everywhere, and there in its middle alone
    shape[2:6, 2:6, 3] = 255
    found = read_image(file_of(shape), 8, 1)[..., 0]
    assert np.array_equal(found == 0, shape[..., 3] > 0)
    assert set(found.flatten().tolist()) == {0, 255}


def test_a_picture_stands_as_its_camera_was_held() -> None:
    pixels = np.zeros((8, 8), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    turned = read_image(file_of(pixels, exif=exif), 8, 1)[..., 0]
    assert np.array_equal(turned, pixels[::-1])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"hello", "no image"),
        (file_of(np.zeros((64, 64)))[:-30], "broken image"),
        (b"P5 20000 20000 255\n", "too large an image"),
    ],
)
def test_what_is_no_image_says_why(content: bytes, why: str) -> None:
    assert read_image(content, 8, 1) == why


def test_rows_draw_by_their_ids_alone() -> None:
    ids = [7, 3, 2**40, -1]
    together = draw_numbers(5, ids, 4)
    assert np.array_equal(draw_numbers(5, ids[::-1], 4), together[::-1])
    assert not np.array_equal(draw_numbers(6, ids, 4), together)
    assert ((together >= 0) & (together < 1)).all()
    assert len(np.unique(together)) == 16


def moved(images: torch.Tensor, drawn: float | np.ndarray[Any, Any], **moves: Any) -> torch.Tensor:
    numbers = np.broadcast_to(drawn, (len(images), NUM_DRAWS))
    return move_images(images, Moves(**moves), np.array(numbers, np.float64))


def test_moves_of_nothing_leave_images_as_they_are() -> None:
    images = some_images()
    assert move_images(images, Moves(), np.zeros((6, NUM_DRAWS))) is images
    middle = moved(images, 0.5, rotate=30, shift=0.2, shear=10, zoom=0.3)
    assert torch.allclose(middle, images, atol=1e-5)


@pytest.mark.parametrize(
    ("flip", "dims"), [("horizontal", [3]), ("vertical", [2]), ("both", [2, 3])]
)
def test_every_second_image_is_mirrored(flip: Any, dims: list[int]) -> None:
    images = some_images()
    assert torch.allclose(moved(images, 0.1, flip=flip), images.flip(dims), atol=1e-5)
    assert torch.allclose(moved(images, 0.9, flip=flip), images, atol=1e-5)


def test_images_are_turned_shifted_and_cut_out() -> None:
    images = some_images()
    drawn = np.full(NUM_DRAWS, 0.5)
    drawn[8] = 1.0
    quarter = moved(images, drawn, rotate=90)
    turns = [images.rot90(times, [2, 3]) for times in (1, 3)]
    assert any(torch.allclose(quarter, turn, atol=1e-4) for turn in turns)
    drawn = np.full(NUM_DRAWS, 0.5)
    drawn[4] = 1.0  # a quarter of 12 to the right
    right = moved(images, drawn, shift=0.25)
    assert torch.allclose(right[..., 3:], images[..., :-3], atol=1e-5)
    assert torch.allclose(right[..., :3], images[..., :1].expand(-1, -1, -1, 3), atol=1e-5)
    drawn = np.full(NUM_DRAWS, 0.5)
    drawn[[0, 6, 7]] = 0.0  # the smallest piece, at a corner
    corner = moved(images, drawn, crop=0.25)
    assert corner.shape == images.shape
    assert corner.amax() <= images.amax() + 1e-6
    place = slice(6, 12)
    expected = nn.functional.interpolate(images[..., place, place], size=12, mode="bilinear")
    assert (corner - expected).abs().mean() < 0.12  # grids that lie half a pixel apart


def test_neighbours_are_mixed_by_a_share_of_their_own() -> None:
    images = some_images(8)
    drawn = draw_numbers(1, range(8), 4)
    mixed, own = mix_pairs(images, drawn, mixup=1.0, cutmix=0.0)
    assert torch.equal(own[0::2], own[1::2])
    for row in range(8):
        share, other = own[row], images[row ^ 1]
        assert torch.allclose(mixed[row], share * images[row] + (1 - share) * other, atol=1e-6)
    # A pair goes by its first row, whatever else is in the batch.
    part, part_own = mix_pairs(images[4:6], drawn[4:6], mixup=1.0, cutmix=0.0)
    assert torch.equal(part, mixed[4:6])
    assert torch.equal(part_own, own[4:6])
    # With this parameter shares are uniform.
    _, many = mix_pairs(
        torch.zeros(2000, 1, 1, 1), draw_numbers(2, range(2000), 4), mixup=1.0, cutmix=0.0
    )
    assert abs(float(many.mean()) - 0.5) < 0.03
    assert abs(float((many < 0.25).float().mean()) - 0.25) < 0.04


def test_a_rectangle_is_the_neighbours() -> None:
    images = torch.stack([torch.full((1, 16, 16), float(value)) for value in range(8)])
    mixed, own = mix_pairs(images, draw_numbers(3, range(8), 4), mixup=0.0, cutmix=1.0)
    for row in range(8):
        other = (mixed[row] == row ^ 1).float().mean()
        assert set(mixed[row].unique().tolist()) <= {float(row), float(row ^ 1)}
        assert 1 - float(other) == pytest.approx(float(own[row]))
    both, shares = mix_pairs(images, draw_numbers(4, range(8), 4), mixup=1.0, cutmix=1.0)
    assert {len(image.unique()) for image in both} == {1, 2}  # some pairs by each
    assert ((shares >= 0) & (shares <= 1)).all()


class Linear(nn.Module):
    """A model of pixels, as small as can be."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.weight.dtype

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.layer(pixel_values.flatten(1)))


def test_mixed_labels_lose_by_their_shares() -> None:
    loss = MixedLabelLoss(Linear(), ["pixel_values"], label_smoothing=0.1).train()
    images = torch.rand(4, 1, 2, 2)
    first, second = torch.tensor([0, 1, 2, IGNORED]), torch.tensor([1, 0, 0, IGNORED])
    share = torch.tensor([0.25, 1.0, 0.5, 0.3])
    batch = {"pixel_values": images, "labels": first}
    mixed, count = loss({**batch, "other_labels": second, "own_share": share})[0]["loss"]
    each = [
        nn.functional.cross_entropy(
            loss.model(images).logits, labels, reduction="none", label_smoothing=0.1
        )
        for labels in (first, second)
    ]
    expected = (share * each[0] + (1 - share) * each[1])[:3].sum()
    assert mixed.item() == pytest.approx(expected.item(), rel=1e-6)
    assert int(count) == 3
    with torch.no_grad():
        (plain, _), output = loss.eval()(batch)[0]["loss"], loss(batch)[1]
        logits = loss.model(images).logits
        summed = nn.functional.cross_entropy(logits, first, reduction="sum")
    assert plain.item() == pytest.approx(summed.item())
    assert torch.allclose(output["log_scores"].exp().sum(dim=1), torch.ones(4))
    assert loss.bfloat16()(batch)[0]["loss"][0].dtype == torch.float32


def test_metrics_of_counts_are_those_of_all_rows() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 8, 300)
    scores = torch.from_numpy(rng.normal(size=(300, 8)))
    scores[torch.arange(300), torch.from_numpy(wanted)] += 1.0
    labels = [f"class {number}" for number in range(8)]
    parts = []
    for places in np.array_split(np.arange(300), 7):
        metrics = ConfusionMetrics(labels)
        own = torch.from_numpy(wanted[places])
        padded = torch.cat([own, torch.tensor([IGNORED])])
        rows = torch.cat([scores[places], scores[:1]])
        metrics.update(
            {"labels": padded}, {"log_scores": rows.log_softmax(1), "loss_sum": torch.tensor(2.0)}
        )
        parts.append(metrics.state())
    whole = ConfusionMetrics(labels).merge(parts)
    found, guesses = whole.compute(), scores.argmax(dim=1).numpy()
    precision, recall, f1, _ = precision_recall_fscore_support(wanted, guesses, average="macro")
    expected = {
        "loss": 14 / 300,
        "accuracy": accuracy_score(wanted, guesses),
        "top5": top_k_accuracy_score(wanted, scores.numpy(), k=5),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "num_targets": 300.0,
    }
    assert found == pytest.approx(expected)
    report = whole.report()
    assert list(report) == labels
    row = report["class 3"]
    assert row["num"] == (wanted == 3).sum()
    assert [row[f"as {label}"] for label in labels] == [
        ((wanted == 3) & (guesses == number)).sum() for number in range(8)
    ]
    empty = ConfusionMetrics(labels)
    assert "accuracy" in empty.undefined()
    assert empty.report() == {}
    assert whole.undefined() == ()


def test_of_many_classes_a_report_has_the_commonest_mistake() -> None:
    labels = [str(number) for number in range(30)]
    metrics = ConfusionMetrics(labels)
    counts = [[number, number, 3] for number in range(30)] + [[4, 9, 2], [4, 8, 1]]
    metrics.merge([{"losses": [math.nan], "counts": counts, "in_five": 93}])
    report = metrics.report()
    assert report["4"]["as 9"] == 2
    assert [name for name in report["4"] if name.startswith("as")] == ["as 9"]
    assert not [name for name in report["5"] if name.startswith("as")]
    assert math.isnan(metrics.compute()["accuracy"])  # of a model that has diverged
