"""Sounds from files, their features, what is hidden of them; alignments, their loss, how they are
read, and metrics of texts."""

from __future__ import annotations

import io
import itertools
import math
from types import SimpleNamespace
from typing import Any

import jiwer
import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from torch import nn
from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2FeatureExtractor

from dray.tasks.parts.alignments import (
    BLANK,
    AlignmentLoss,
    TextMetrics,
    read_by_beam,
    read_greedily,
)
from dray.tasks.parts.columns import draw_numbers
from dray.tasks.parts.sounds import (
    NUM_BANDS,
    RATE,
    STACKED,
    hide_bands,
    hide_spans,
    log_mel,
    normalized,
    padded,
    read_sound,
)


def tone(hertz: float = 440.0, seconds: float = 0.5, rate: int = RATE) -> npt.NDArray[np.float64]:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def file_of(samples: Any, rate: int, form: str, subtype: str | None = None) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=form, subtype=subtype)
    return out.getvalue()


def pitch_of(samples: npt.NDArray[Any]) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * RATE / len(samples))


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
def test_a_file_of_any_kind_and_rate_is_the_same_sound(form: str, rate: int) -> None:
    samples = read_sound(file_of(tone(rate=rate), rate, form))
    assert isinstance(samples, np.ndarray)
    assert abs(len(samples) / RATE - 0.5) < 0.11  # mp3 pads
    assert pitch_of(samples) == pytest.approx(440, abs=5)


def test_channels_become_one_and_what_is_no_sound_says_so() -> None:
    both = np.stack([tone(300), -tone(300)], axis=1)
    assert np.abs(read_sound(file_of(both, RATE, "FLAC"))).max() < 1e-3
    whole = file_of(tone(), RATE, "FLAC")
    assert read_sound(b"hello") == read_sound(whole[:20]) == "no sound, or a broken one"
    broken = np.full(800, np.nan)
    content = file_of(broken, RATE, "WAV", "FLOAT")
    assert read_sound(content) == "samples that are no numbers"


def test_features_are_those_that_transformers_makes() -> None:
    samples = tone().astype(np.float32) + 0.01 * np.sin(np.arange(8000) ** 1.5).astype(np.float32)
    theirs = SeamlessM4TFeatureExtractor()(samples, sampling_rate=RATE, return_tensors="np")
    inside = theirs["attention_mask"][0].astype(bool)
    assert np.allclose(log_mel(samples), theirs["input_features"][0][inside], atol=1e-5)
    assert log_mel(samples).shape == (24, STACKED)
    assert log_mel(samples[:900]).shape == (0, STACKED)
    found = normalized(torch.from_numpy((samples * 32767).astype(np.int16)))
    expected = Wav2Vec2FeatureExtractor(do_normalize=True)(samples, sampling_rate=RATE)
    assert np.allclose(found, expected["input_values"][0], atol=1e-3)


def test_sounds_of_several_lengths_lie_side_by_side() -> None:
    values, inside = padded([torch.ones(3, 2), torch.ones(5, 2), torch.ones(0, 2)])
    assert values.shape == (3, 5, 2)
    assert inside.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert values.sum(dim=(1, 2)).tolist() == [6, 10, 0]
    nothing, place = padded([torch.ones(0)])
    assert (nothing.tolist(), place.tolist()) == ([[0.0]], [[1]])


def test_what_is_hidden_of_a_sound_goes_by_its_own_numbers() -> None:
    values, lengths = torch.ones(40, 50, STACKED), torch.tensor([50, 20] * 20)
    drawn = draw_numbers(3, range(40), 8)
    spans = hide_spans(values, lengths, drawn, num=2, share=0.2)
    hidden = (spans == 0).all(dim=2)
    assert torch.equal(hidden, (spans == 0).any(dim=2))  # whole tokens
    assert hidden[0::2].sum(dim=1).max() <= 20
    assert hidden[1::2].sum(dim=1).max() <= 8
    assert not hidden[1::2, 20:].any()  # none behind the sound's end
    assert 0 < hidden.float().mean() < 0.3
    bands = hide_bands(values, drawn, num=2, most=12)
    dark = (bands == 0)[:, 0]
    assert torch.equal(dark[:, :NUM_BANDS], dark[:, NUM_BANDS:])  # in both windows of a token
    assert torch.equal((bands == 0).all(dim=1), dark)
    assert 0 < dark.sum(dim=1).max() <= 48
    alone = hide_spans(values[7:8], lengths[7:8], drawn[7:8], num=2, share=0.2)
    assert torch.equal(alone[0], spans[7])
    samples = hide_spans(torch.ones(2, 50), lengths[:2], drawn[:2], num=1, share=0.5)
    assert samples.shape == (2, 50)


class Heard(nn.Module):
    """Gives out what it is told to, as many states as tokens or half of them."""

    def __init__(self, logits: torch.Tensor, tokens: int) -> None:
        super().__init__()
        self.logits, self.tokens = nn.Parameter(logits), tokens
        self.dtype = torch.float32

    def forward(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.logits)

    def _get_feat_extract_output_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        return lengths // 2


def batch_of(num_rows: int, tokens: int, lengths: list[int]) -> dict[str, torch.Tensor]:
    return {
        "input_values": torch.zeros(num_rows, tokens),
        "attention_mask": (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long(),
        "letters": torch.tensor([[1, 1, 2], [2, 0, 0], [3, 3, 3]]),
        "num_letters": torch.tensor([3, 1, 0]),
    }


@pytest.mark.parametrize("tokens", [6, 12])
def test_the_loss_is_that_of_all_alignments(tokens: int) -> None:
    """Each alignment of each row, one by one; rows of padding count nothing."""
    logits = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    lengths = [6, 4, 6] if tokens == 6 else [12, 8, 12]
    model = Heard(logits, tokens)
    terms, _ = AlignmentLoss(model, ["input_values"])(batch_of(3, tokens, lengths))
    scores = logits.double().log_softmax(dim=-1)
    expected = 0.0
    for row, letters, states in ((0, [1, 1, 2], 6), (1, [2], 4)):
        likelihood = 0.0
        for path in itertools.product(range(4), repeat=states):
            read = [one for one, _ in itertools.groupby(path) if one != BLANK]
            if read == letters:
                likelihood += math.exp(sum(scores[row, t, path[t]].item() for t in range(states)))
        expected -= math.log(likelihood)
    loss, count = terms["loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert int(count) == 4
    loss.backward()
    assert model.logits.grad is not None
    assert bool((model.logits.grad[2] == 0).all())
    assert bool((model.logits.grad[1, 4:] == 0).all())


def brute_force(scores: torch.Tensor) -> list[int]:
    """The likeliest text of all there are."""
    states, classes = scores.shape
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(classes), repeat=states):
        text = tuple(one for one, _ in itertools.groupby(path) if one != BLANK)
        likelihood = math.exp(sum(scores[t, path[t]].item() for t in range(states)))
        found[text] = found.get(text, 0.0) + likelihood
    return list(max(found, key=lambda text: found[text]))


def test_a_beam_finds_the_likeliest_text_and_greed_the_likeliest_alignment() -> None:
    generator = torch.Generator().manual_seed(2)
    scores = (2 * torch.randn(30, 5, 3, generator=generator)).log_softmax(dim=-1)
    lengths = torch.full((30,), 5)
    expected = [brute_force(row) for row in scores]
    assert read_by_beam(scores, lengths, width=50) == expected
    greedy = read_greedily(scores, lengths)
    assert greedy != expected  # or the search would be for nothing
    paths = [[one for one, _ in itertools.groupby(row)] for row in scores.argmax(2).tolist()]
    assert greedy == [[one for one in path if one != BLANK] for path in paths]
    assert read_greedily(scores, torch.zeros(30, dtype=torch.int64)) == [[]] * 30
    assert read_by_beam(scores[:1], torch.tensor([0]), width=4) == [[]]


def test_errors_of_texts_are_jiwers() -> None:
    wanted = ["one two", "three", "four five six", ""]
    found = ["one too", "three", "four six six", "noise of padding"]
    parts = []
    for place in range(4):
        metrics = TextMetrics(
            lambda batch, place=place: [wanted[place]], lambda output, place=place: [found[place]]
        )
        letters = torch.tensor([len(wanted[place])])
        metrics.update({"num_letters": letters}, {"loss_sum": torch.tensor(1.5)})
        parts.append(metrics.state())
    whole = TextMetrics(list, list).merge(parts)
    values = whole.compute()
    assert values == pytest.approx(
        {
            "loss": 6.0 / 25,
            "wer": jiwer.wer(wanted[:3], found[:3]),
            "cer": jiwer.cer(wanted[:3], found[:3]),
            "exact": 1 / 3,
            "num_targets": 25.0,
        }
    )
    assert whole.report()["words"] == {
        "num": 6,
        "substitutions": 2,
        "deletions": 0,
        "insertions": 0,
    }
    empty = TextMetrics(list, list)
    assert (empty.undefined(), whole.undefined()) == (TextMetrics.names, ())
    empty.merge([{**parts[0], "losses": [math.inf]}])
    assert math.isnan(empty.compute()["cer"])
