"""Texts read off a sequence of hidden states whose alignment nobody knows: connectionist temporal
classification (CTC; Graves et al. 2006), its loss, two ways to decode it, and metrics of texts.

Class 0 is the blank, which parts two equal letters and is no letter itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dray.tasks.parts.metrics import total
from dray.tasks.parts.mixed_labels import given_inputs
from dray.tasks.parts.ratio_scores import Ratios
from dray.tasks.task import Batch, Output, Terms

BLANK = 0


class AlignmentLoss(nn.Module):
    """A model of the classes of each hidden state, and the summed negative log-likelihood of each
    row's letters over all their alignments, in nats; its targets are the letters.

    A batch has `attention_mask` [rows, tokens], `letters` [rows, most] and `num_letters` [rows];
    rows with none are of padding, and count nothing. `inputs` names what the model is given besides
    the mask. Where no gradient is wanted metrics get `log_scores` [rows, states, classes] and
    `num_states` [rows].
    """

    def __init__(self, model: Any, inputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs = model, (*inputs, "attention_mask")

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        logits = self.model(**given_inputs(self.model, batch, self.inputs)).logits
        log_scores = torch.log_softmax(logits.float(), dim=-1)
        num_states = self._num_states(batch["attention_mask"], logits.shape[1])
        num_letters = batch["num_letters"]
        losses = F.ctc_loss(
            log_scores.transpose(0, 1),
            batch["letters"],
            num_states,
            num_letters,
            blank=BLANK,
            reduction="none",
            zero_infinity=True,
        )
        loss = (losses * (num_letters > 0)).sum()
        terms: Terms = {"loss": (loss, num_letters.sum())}
        if torch.is_grad_enabled():
            return terms, {}
        return terms, {"loss_sum": loss, "log_scores": log_scores, "num_states": num_states}

    def _num_states(self, mask: Tensor, width: int) -> Tensor:
        """Of each row: its tokens, or what convolutions before the model make of them."""
        lengths = mask.sum(dim=1)
        if width == mask.shape[1]:
            return lengths
        states: Tensor = self.model._get_feat_extract_output_lengths(lengths)
        return states.clamp(max=width).long()


def read_greedily(log_scores: Tensor, num_states: Tensor) -> list[list[int]]:
    """The letters of each row's likeliest alignment."""
    guesses = log_scores.argmax(dim=-1).cpu()
    found = []
    for states, length in zip(guesses, num_states.tolist(), strict=True):
        met = torch.unique_consecutive(states[:length])
        found.append(met[met != BLANK].tolist())
    return found


def read_by_beam(log_scores: Tensor, num_states: Tensor, width: int) -> list[list[int]]:
    """The likeliest letters of each row, all their alignments together, by a search that keeps so
    many beginnings (prefix search: Hannun et al. 2014, arXiv:1408.2873, without a language
    model)."""
    rows = log_scores.double().cpu().numpy()
    pairs = zip(rows, num_states.tolist(), strict=True)
    return [_search(states[:length], width) for states, length in pairs]


def _search(states: npt.NDArray[np.float64], width: int) -> list[int]:
    """Letters of one row, from log-probabilities [states, classes]."""
    # Of each beginning: the log-probability of its alignments that end in a blank, and in its last
    # letter.
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    for scores in states.tolist():
        likely = sorted(range(1, len(scores)), key=scores.__getitem__, reverse=True)[:width]
        grown: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [-math.inf, -math.inf])
        for text, (blank, letter) in beams.items():
            either = _add(blank, letter)
            own = grown[text]
            own[0] = _add(own[0], either + scores[BLANK])
            if text:
                own[1] = _add(own[1], letter + scores[text[-1]])
            for new in likely:
                # A letter again is another one only behind a blank.
                before = blank if text and new == text[-1] else either
                longer = grown[(*text, new)]
                longer[1] = _add(longer[1], before + scores[new])
        best = sorted(grown, key=lambda text: _add(*grown[text]), reverse=True)[:width]
        beams = {text: (grown[text][0], grown[text][1]) for text in best}
    likeliest = max(beams, key=lambda text: _add(*beams[text]))
    return list(likeliest)


def _add(one: float, other: float) -> float:
    """The logarithm of the sum of two numbers given by their logarithms."""
    return float(np.logaddexp(one, other))


class TextMetrics:
    """Texts beside those that were wanted: errors in words and in characters, by jiwer.

    `wanted` reads the texts off a batch, empty ones of padding; `found` those that a model gives.
    """

    names = ("loss", "wer", "cer", "exact")

    def __init__(
        self, wanted: Callable[[Batch], list[str]], found: Callable[[Output], list[str]]
    ) -> None:
        self._read_wanted, self._read_found = wanted, found
        self._losses: list[float] = []
        self._num_letters = 0
        self._wanted: list[str] = []
        self._found: list[str] = []

    def update(self, batch: Batch, output: Output) -> None:
        self._losses.append(float(output["loss_sum"]))
        self._num_letters += int(batch["num_letters"].sum())
        pairs = zip(self._read_wanted(batch), self._read_found(output), strict=True)
        for wanted, found in pairs:
            if wanted:
                self._wanted.append(wanted)
                self._found.append(found)

    def state(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "num_letters": self._num_letters,
            "wanted": list(self._wanted),
            "found": list(self._found),
        }

    def merge(self, states: Iterable[dict[str, Any]]) -> Self:
        for state in states:
            self._losses += state["losses"]
            self._num_letters += state["num_letters"]
            self._wanted += state["wanted"]
            self._found += state["found"]
        return self

    def compute(self) -> dict[str, float]:
        """`loss` (nats a letter), `wer` and `cer` (errors for each word or character that is
        wanted), `exact` (share of texts without any), `num_targets` (letters)."""
        if not self._wanted:
            return dict.fromkeys((*self.names, "num_targets"), 0.0)
        import jiwer

        loss = total(self._losses) / max(1, self._num_letters)
        if not math.isfinite(loss):  # texts of a model that has diverged are none
            nothing = dict.fromkeys(self.names[1:], math.nan)
            return {"loss": loss, **nothing, "num_targets": float(self._num_letters)}
        same = sum(one == other for one, other in zip(self._wanted, self._found, strict=True))
        return {
            "loss": loss,
            "wer": float(jiwer.wer(self._wanted, self._found)),
            "cer": float(jiwer.cer(self._wanted, self._found)),
            "exact": same / len(self._wanted),
            "num_targets": float(self._num_letters),
        }

    def scores(self, labels: Sequence[str]) -> Ratios:
        """Of each text its errors in words and in characters, and whether there are none."""
        import jiwer

        pairs = list(zip(self._wanted, self._found, strict=True))
        sums = {}
        for name, count in (("wer", jiwer.process_words), ("cer", jiwer.process_characters)):
            told = [count(one, other) for one, other in pairs]
            errors = [one.substitutions + one.deletions + one.insertions for one in told]
            sizes = [one.hits + one.substitutions + one.deletions for one in told]
            sums[name] = np.array(errors, np.float64), np.array(sizes, np.float64)
        same = np.array([one == other for one, other in pairs], np.float64)
        return Ratios(
            sums | {"exact": (same, np.ones(len(pairs)))}, "wer", of="text", aligned=False
        )

    def undefined(self) -> tuple[str, ...]:
        return () if self._wanted else self.names

    def report(self) -> dict[str, dict[str, float]]:
        """Of words and of characters: how many are wanted, and how many were taken for others, left
        out or put in."""
        if not self._wanted:
            return {}
        import jiwer

        found: dict[str, Any] = {
            "words": jiwer.process_words(self._wanted, self._found),
            "characters": jiwer.process_characters(self._wanted, self._found),
        }
        return {
            name: {
                "num": told.hits + told.substitutions + told.deletions,
                "substitutions": told.substitutions,
                "deletions": told.deletions,
                "insertions": told.insertions,
            }
            for name, told in found.items()
        }
