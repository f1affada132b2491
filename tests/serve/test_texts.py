"""What a stream gives out: whole characters, and no part of what stops it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dray.serve.sampling import Sampler, Sampling, in_nucleus
from dray.serve.texts import TextStream


def as_bytes(ids: Sequence[int]) -> str:
    """A tokeniser whose tokens are bytes."""
    return bytes(ids).decode("utf-8", "replace")


def _prefixes(text: str) -> list[str]:
    return [text[:end] for end in range(len(text) + 1)]


words = st.text(st.characters(codec="utf-8"), max_size=30)


@settings(max_examples=200, deadline=None)
@given(words, st.lists(st.text("ab首😀", min_size=1, max_size=4), max_size=3))
@example("aba", ["aba", "b"])
def test_pieces_are_the_text_up_to_the_first_stop(text: str, stops: list[str]):
    stream, given_out = TextStream(as_bytes, stops), ""
    for token in text.encode():
        piece = stream.push(token)
        assert "\ufffd" not in piece or "\ufffd" in text
        given_out += piece
        assert text.startswith(given_out)
        if stream.stopped:
            break
    given_out += stream.finish()
    # The stop that is whole first ends it, though a longer one may have begun before.
    seen = next((p for p in _prefixes(text) if any(stop in p for stop in stops)), text)
    ends = [place for stop in stops if (place := seen.find(stop)) >= 0]
    assert stream.stopped == bool(ends)
    assert not any(stop in given_out for stop in stops)
    assert given_out == text[: min(ends, default=len(text))]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text_are_waited_for_no_longer_than_to_the_end(tokens: list[int]):
    stream = TextStream(as_bytes)
    given_out = "".join(map(stream.push, tokens)) + stream.finish()
    assert len(given_out.encode("utf-8", "replace")) > 0 or not tokens
    assert given_out.replace("\ufffd", "") == as_bytes(tokens).replace("\ufffd", "")


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 1.0), st.integers(0, 2**32))
def test_a_nucleus_is_the_smallest_set_with_its_share(top_p: float, seed: int):
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(seed)) * 3
    probabilities = logits.softmax(-1)
    kept = in_nucleus(probabilities, top_p)
    inside = kept > 0
    assert float(kept.sum()) >= top_p - 1e-5
    least = probabilities[inside].min()
    assert float(kept.sum() - least) < top_p + 1e-5
    assert bool((probabilities[~inside] <= least).all())


def test_draws_follow_the_distribution():
    logits = torch.tensor([2.0, 0.0, 1.0, -9.0])
    sampler = Sampler(Sampling(temperature=0.5, seed=1))
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sampler.draw(logits).token] += 1
    expected = (logits / 0.5).softmax(-1)
    assert torch.allclose(counts / 4000, expected, atol=0.03)


@pytest.mark.parametrize("temperature", [1e-38, 1e-300, 1e-7])
def test_next_to_no_temperature_is_the_likeliest_token(temperature: float):
    logits = torch.tensor([2.0, 40.0, 39.9, -9.0])
    sampler = Sampler(Sampling(temperature=temperature, seed=1))
    assert {sampler.draw(logits).token for _ in range(50)} == {1}
