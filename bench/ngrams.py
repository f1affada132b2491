"""A trigram model beside a language model of dray's, on the same tokens: its loss on the targets of
a run's validation rows, after counting the run's training rows.

    python -m bench.ngrams RUN [--storage DIR]

Interpolated Kneser–Ney (Ney, Essen, Kneser 1994; Chen, Goodman 1999, eq. 4.38) with the usual
discount n1 / (n1 + 2·n2) of each order, and every token of the vocabulary possible. Nothing is
tuned on what is measured. A document of a task whose rows hold several apart counts by itself.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from bench.baselines import batches
from dray.corpus.manifest import Split
from dray.release.trained import Trained, open_trained
from dray.tasks import IGNORED

BEGIN = -1
"""Before a document's first token."""
Gram = tuple[int, ...]


class KneserNey:
    """Trigrams of token ids."""

    def __init__(self, documents: Iterator[list[int]], vocab_size: int, order: int = 3) -> None:
        self.order, self.vocab_size = order, vocab_size
        counts: Counter[Gram] = Counter()
        for ids in documents:
            padded = [BEGIN] * (order - 1) + ids
            counts.update(
                tuple(padded[at - order + 1 : at + 1]) for at in range(order - 1, len(padded))
            )
        self.levels: list[tuple[Counter[Gram], Counter[Gram], Counter[Gram], float]] = []
        for _ in range(order):
            before: Counter[Gram] = Counter()
            kinds: Counter[Gram] = Counter()
            lower: Counter[Gram] = Counter()
            for gram, count in counts.items():
                before[gram[:-1]] += count
                kinds[gram[:-1]] += 1
                lower[gram[1:]] += 1  # how many words a shorter one follows upon
            once, twice = (sum(count == wanted for count in counts.values()) for wanted in (1, 2))
            discount = once / (once + 2 * twice) if once and twice else 0.5
            self.levels.append((counts, before, kinds, discount))
            counts = lower

    def probability(self, gram: Gram) -> float:
        """Of a token after those before it."""
        found = 1.0 / self.vocab_size
        for size in range(1, self.order + 1):
            counts, before, kinds, discount = self.levels[self.order - size]
            tail = gram[len(gram) - size :]
            if total := before[tail[:-1]]:
                kept = max(0.0, counts[tail] - discount) / total
                found = kept + discount * kinds[tail[:-1]] / total * found
        return found


def documents_of(trained: Trained, split: Split) -> Iterator[tuple[list[int], list[bool]]]:
    """The tokens of each document of a split, and which of them are targets."""
    for batch in batches(trained, split):
        if trained.spec.task.head.behind_encoder:  # labels are a row of their own
            for labels in batch["labels"].tolist():
                answer = [label for label in labels if label != IGNORED]
                yield answer, [True] * len(answer)
            continue
        places = batch.get("position_ids")
        for row, (ids, labels) in enumerate(
            zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        ):
            begins = [0] if places is None else (places[row] == 0).nonzero()[:, 0].tolist()
            for start, stop in pairwise([*begins, len(ids)]):
                asked = [label != IGNORED for label in labels[start:stop]]
                if any(asked):
                    end = stop - asked[::-1].index(True)  # the last target stands behind its place
                    yield ids[start : end + 1], [False, *asked[: end - start]]


def measure(trained: Trained, order: int) -> dict[str, float]:
    """The mean loss of the validation rows' targets, in nats, as `dray evaluate` counts it."""
    manifest = trained.manifest
    if manifest.validation is None:
        raise SystemExit("the run has no validation rows")
    taught = (ids for ids, _ in documents_of(trained, manifest.train))
    model = KneserNey(taught, manifest.vocab_size, order)
    losses: list[float] = []
    for ids, asked in documents_of(trained, manifest.validation):
        padded = [BEGIN] * (order - 1) + ids
        losses += [
            -math.log(model.probability(tuple(padded[at : at + order])))
            for at, is_target in enumerate(asked)
            if is_target
        ]
    loss = math.fsum(losses) / len(losses)
    return {"loss": loss, "perplexity": math.exp(loss), "num_targets": float(len(losses))}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--storage", default="./runs")
    given = parser.parse_args()
    trained = open_trained(given.storage, given.run)
    found: dict[str, Any] = {f"{order}-gram": measure(trained, order) for order in (1, 3)}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
