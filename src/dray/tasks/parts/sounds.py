"""Sounds as tasks share them: from the bytes of a file to samples, to features, and how features
are hidden for training.

libsndfile reads (wav, flac, ogg, mp3), scipy resamples, transformers' extractors make features as
those of pretrained models were made. Needs the extra `sounds`.
"""

from __future__ import annotations

import io
import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dray.errors import caught

RATE = 16_000
"""Samples a second, as pretrained models of speech have them."""
TOKEN_SAMPLES = 320
"""Samples of a token: 20 ms, which is what such models make one hidden state of."""
NUM_BANDS = 80
STACKED = 2 * NUM_BANDS
"""Numbers of a token: log-mel energies of two windows of 25 ms, 10 ms apart."""

MOST_SECONDS = 600
"""Of a sound: what is compressed may become thousands of times as much in memory."""


def read_sound(content: bytes) -> npt.NDArray[np.float32] | str:
    """The samples of a sound file at RATE, its channels' mean; or, in a word or two, why there are
    none."""
    import soundfile
    from scipy.signal import resample_poly

    def read() -> npt.NDArray[np.float32] | str:
        with soundfile.SoundFile(io.BytesIO(content)) as sound:
            rate = sound.samplerate
            if sound.frames > MOST_SECONDS * rate:
                return f"a sound of more than {MOST_SECONDS} s"
            samples = sound.read(dtype="float32", always_2d=True)
        mono = samples.mean(axis=1)
        shared = math.gcd(rate, RATE)
        if rate != RATE:
            mono = resample_poly(mono, RATE // shared, rate // shared)
        clipped: npt.NDArray[np.float32] = np.clip(mono, -1.0, 1.0).astype(np.float32)
        return clipped

    samples, _ = caught(read)
    if samples is None:
        return "no sound, or a broken one"
    if isinstance(samples, str):
        return samples
    if not np.isfinite(samples).all():
        return "samples that are no numbers"
    return samples


def log_mel(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Log-mel energies of a sound, [tokens, STACKED], each band with mean 0 and variance 1 over it,
    as Wav2Vec2-BERT's extractor makes them; none of less than two tokens."""
    if len(samples) < 3 * TOKEN_SAMPLES:
        return np.empty((0, STACKED), np.float32)
    found = _log_mel_extractor()(samples, sampling_rate=RATE, return_tensors="np")
    inside = found["attention_mask"][0].astype(bool)
    features: npt.NDArray[np.float32] = found["input_features"][0][inside].astype(np.float32)
    return features


@cache
def _log_mel_extractor() -> Any:
    from transformers import SeamlessM4TFeatureExtractor

    return SeamlessM4TFeatureExtractor(
        feature_size=NUM_BANDS, num_mel_bins=NUM_BANDS, sampling_rate=RATE, stride=2
    )


def normalized(samples: Tensor) -> Tensor:
    """Samples with mean 0 and variance 1, as Wav2Vec2's extractor makes them."""
    wide = samples.float()
    return (wide - wide.mean()) / torch.sqrt(wide.var(unbiased=False) + 1e-7)


def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sounds side by side, [rows, longest, …], with zeros behind; and where they are, int64 [rows,
    longest]. One without anything has one place, or attention would have nothing to look at."""
    values = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([max(1, len(row)) for row in rows])
    if not values.shape[1]:
        values = values.new_zeros(len(rows), 1, *values.shape[2:])
    inside = torch.arange(values.shape[1])[None, :] < lengths[:, None]
    return values, inside.long()


def hide_spans(
    values: Tensor,
    lengths: Tensor,
    drawn: npt.NDArray[np.float64],
    *,
    num: int,
    share: float,
) -> Tensor:
    """Sounds [rows, tokens, …] with spans of tokens set to 0, each of up to a share of its sound
    (SpecAugment: Park et al. 2019, arXiv:1904.08779). `drawn` [rows, at least 2·num]."""
    numbers = torch.from_numpy(drawn[:, : 2 * num]).reshape(len(values), num, 2)
    widths = (numbers[..., 0] * share * lengths[:, None]).round()
    starts = (numbers[..., 1] * (lengths[:, None] - widths + 1)).floor()
    places = torch.arange(values.shape[1])
    inside = (places >= starts[..., None]) & (places < (starts + widths)[..., None])
    hidden = inside.any(dim=1).reshape(*values.shape[:2], *[1] * (values.dim() - 2))
    return values.masked_fill(hidden, 0.0)


def hide_bands(values: Tensor, drawn: npt.NDArray[np.float64], *, num: int, most: int) -> Tensor:
    """Log-mel energies [rows, tokens, STACKED] with runs of up to `most` neighbouring bands set to
    0, the same in all of a sound's tokens. `drawn` [rows, at least 2·num]."""
    numbers = torch.from_numpy(drawn[:, : 2 * num]).reshape(len(values), num, 2)
    widths = (numbers[..., 0] * (most + 1)).floor()
    starts = (numbers[..., 1] * (NUM_BANDS - widths + 1)).floor()
    bands = torch.arange(NUM_BANDS)
    inside = (bands >= starts[..., None]) & (bands < (starts + widths)[..., None])
    hidden = inside.any(dim=1).repeat(1, 2)[:, None, :]
    return values.masked_fill(hidden, 0.0)
