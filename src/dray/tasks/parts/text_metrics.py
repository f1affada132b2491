"""Metrics of texts that models write, beside those that they were to write: BLEU and chrF by
sacrebleu, ROUGE by rouge-score.

All need a word for what a word is: `Words` are sacrebleu's names of tokenisers, which ROUGE then
counts by, too, since its own knows no letters but ASCII.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np

from dray.tasks.parts.metrics import TokenMetrics
from dray.tasks.parts.ratio_scores import Ratios
from dray.tasks.parts.scores import Scores
from dray.tasks.parts.texts import Words
from dray.tasks.rows import IGNORED
from dray.tasks.task import Batch, Decode, Output

_TOKENIZERS = {
    "13a": "tokenizer_13a.Tokenizer13a",
    "intl": "tokenizer_intl.TokenizerV14International",
    "zh": "tokenizer_zh.TokenizerZh",
    "char": "tokenizer_char.TokenizerChar",
}
_ROUGE = ("rouge1", "rouge2", "rougeL")
NAMES = ("bleu", "chrf", *(name.lower() for name in _ROUGE), "exact")


class WrittenMetrics(TokenMetrics):
    """The loss of answers, and how near what was written comes to them."""

    def __init__(self, decode: Decode, words: Words) -> None:
        super().__init__()
        self._decode, self._words = decode, words
        self._texts: list[tuple[str, str]] = []
        """(wanted, written)"""

    def update(self, batch: Batch, output: Output) -> None:
        super().update(batch, output)
        for answer, written in zip(batch["answers"], output["written"], strict=True):
            wanted = answer[answer != IGNORED].tolist()
            if wanted:
                self._texts.append((self._decode(wanted), self._decode(written.tolist())))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "texts": [list(pair) for pair in self._texts]}

    def merge(self, states: Iterable[dict[str, Any]]) -> WrittenMetrics:
        kept = list(states)
        super().merge(kept)
        self._texts += [(wanted, written) for state in kept for wanted, written in state["texts"]]
        return self

    def compute(self) -> dict[str, float]:
        """As tokens alone, with those of `measure_texts`, and `num_texts`."""
        pairs = sorted(self._texts)  # so that sums do not depend on the order of the rows
        found = measure_texts(*zip(*pairs, strict=True), words=self._words) if pairs else {}
        empty = dict.fromkeys(NAMES, 0.0)
        return {**super().compute(), **empty, **found, "num_texts": float(len(pairs))}

    def scores(self, labels: Sequence[str]) -> Scores:
        """Those of tokens and, where each batch was one answer, whether it is the wanted one, and
        its ROUGE-L. BLEU and chrF are of a whole corpus, not of its texts."""
        found = super().scores(labels)
        if not isinstance(found, Ratios) or len(found) != len(self._texts):
            return found
        scorer = _rouge(("rougeL",), self._words)
        shared = [scorer.score(*pair)["rougeL"].fmeasure for pair in self._texts]
        same = [wanted.strip() == written.strip() for wanted, written in self._texts]
        ones = np.ones(len(found))
        written = {"exact": (np.array(same, np.float64), ones), "rougel": (np.array(shared), ones)}
        return replace(found, sums={**found.sums, **written}, of="answer", aligned=False)

    def undefined(self) -> tuple[str, ...]:
        return (*super().undefined(), *(() if self._texts else NAMES))


def measure_texts(
    wanted: Sequence[str], written: Sequence[str], *, words: Words = "13a"
) -> dict[str, float]:
    """`bleu` (0 to 100, over the corpus; sacrebleu), `chrf` (0 to 100), `rouge1`, `rouge2` and
    `rougel` (the mean F-measure, 0 to 1), `exact`: the share of texts that are equal but for space
    around them."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    scorer = _rouge(_ROUGE, words)
    scores = [scorer.score(one, other) for one, other in zip(wanted, written, strict=True)]
    same = sum(one.strip() == other.strip() for one, other in zip(wanted, written, strict=True))
    return {
        "bleu": float(BLEU(tokenize=words).corpus_score(list(written), [list(wanted)]).score),
        "chrf": float(CHRF().corpus_score(list(written), [list(wanted)]).score),
        **{
            name.lower(): math.fsum(score[name].fmeasure for score in scores) / len(scores)
            for name in _ROUGE
        },
        "exact": same / len(scores),
    }


def _rouge(names: Sequence[str], words: Words) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(names), tokenizer=_Splitter(words))


class _Splitter:
    """What ROUGE counts: sacrebleu's words in lower case."""

    def __init__(self, words: Words) -> None:
        module, _, name = _TOKENIZERS[words].partition(".")
        self._split = getattr(import_module(f"sacrebleu.tokenizers.{module}"), name)()

    def tokenize(self, text: str) -> list[str]:
        return str(self._split(text.lower())).split()
