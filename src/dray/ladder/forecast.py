"""What a ladder tells: the spec's loss, and the model that would do best for a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dray.ladder.rungs import Rung, scaled_sizes
from dray.ladder.scaling import Measured, ScalingLaw, fit_again, fit_law, is_enough
from dray.spec import Spec
from dray.sweep.events import COMPLETED
from dray.sweep.study import Study

LEVEL = 0.9
"""Of intervals: between these quantiles of the laws fitted to rungs drawn again."""
MOST_EPOCHS = 4.0
"""Tokens seen more often than that teach less than new ones do (Muennighoff et al. 2023, arXiv
2305.16264): the law, which was fitted to new ones, says nothing of them."""


@dataclass(frozen=True)
class Interval:
    """A number and how sure it is."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Forecast:
    """What a ladder tells."""

    law: ScalingLaw
    rungs: tuple[tuple[Rung, float], ...]
    """With the loss that each came to."""
    target: Rung
    loss: Interval
    """Of the spec itself."""
    check: float | None
    """The loss of the largest size's longest rung as the law of the others foretells it, ÷ what it
    is, less 1; None: the others are too few."""
    missing: tuple[str, ...]
    """Rungs that the law does without, and why."""
    best: Rung
    """The model that would do best with `flops`."""
    best_loss: Interval
    edge: str
    """Where the best lies among the sizes looked at, if at an edge: then a better one may lie
    beyond."""
    flops: float
    epochs: float
    """How often the best model would see each token of the corpus."""

    def reach(self, rung: Rung) -> dict[str, float]:
        """How many times beyond the ladder a rung lies, in parameters and in tokens."""
        sizes = [known.size.num_parameters for known, _ in self.rungs]
        tokens = [known.num_tokens for known, _ in self.rungs]
        return {
            "parameters": rung.size.num_parameters / max(sizes),
            "tokens": rung.num_tokens / max(tokens),
        }

    def to_json(self) -> dict[str, Any]:
        """As `dray show --json` prints it."""
        return {
            "loss": vars(self.loss),
            "target": self.target.to_json(),
            "law": vars(self.law),
            "untold": self.law.untold,
            "check": self.check,
            "missing": list(self.missing),
            "reach": self.reach(self.target),
            "rungs": [
                {**rung.to_json(), "loss": loss, "fitted": _loss(self.law, rung)}
                for rung, loss in self.rungs
            ],
            "best": {
                **self.best.to_json(),
                "loss": vars(self.best_loss),
                "reach": self.reach(self.best),
                "edge": self.edge,
                "epochs": self.epochs,
                "is_seen_too_often": self.epochs > MOST_EPOCHS,
            },
            "budget_flops": self.flops,
            "share": sum(rung.flops for rung, _ in self.rungs) / self.target.flops,
        }


def load_forecast(ladder: Mapping[str, Any], study: Study | None) -> Forecast | None:
    """The forecast of a sweep that is a ladder, by what its record says (`ladder`) and its trials;
    none while too few rungs have been trained."""
    if study is None:
        return None
    kept = [Rung.from_json(rung) for rung in ladder["rungs"]]
    rungs, missing = list[tuple[Rung, float]](), list[str]()
    for trial in study.trials.values():
        loss = trial.reports[-1].value if trial.reports else None
        if trial.status == COMPLETED and loss is not None:
            rungs.append((kept[trial.drawing], loss))
        else:
            missing.append(f"{trial.number:04d} {trial.cause or trial.status}")
    missing += [f"{number + 1:04d} not begun" for number in range(len(study.trials), len(kept))]
    measured = [_measured(rung, loss) for rung, loss in rungs]
    if not is_enough(measured):
        return None
    target = Rung.from_json(ladder["target"])
    law = fit_law(measured)
    again = fit_again(measured, law)
    budget = ladder.get("flops") or target.flops
    best, edge = find_best(law, study.spec, budget, ladder["vocab_size"])
    return Forecast(
        law=law,
        rungs=tuple(rungs),
        target=target,
        loss=_interval(law, again, target),
        check=_check(measured),
        missing=tuple(missing),
        best=best,
        best_loss=_interval(law, again, best),
        edge=edge,
        flops=budget,
        epochs=best.num_tokens / ladder["corpus_tokens"],
    )


def find_best(
    law: ScalingLaw, spec: Spec, flops: float, vocab_size: int | None
) -> tuple[Rung, str]:
    """The model, by the law, that does best for so many FLOPs, of sizes like the spec's own: the
    whole budget goes into its tokens. And where it lies among the sizes looked at, if at an
    edge."""
    rungs = [
        Rung(size, max(1, round(flops / size.flops_per_token)))
        for size in scaled_sizes(spec, vocab_size)
    ]
    best = min(rungs, key=lambda rung: _loss(law, rung))
    edges = {rungs[0]: "the smallest size", rungs[-1]: "the largest size"}
    return best, edges.get(best, "")


def _check(measured: Sequence[Measured]) -> float | None:
    """How far off the longest rung of the largest size is, foretold by all others."""
    largest = max(measured, key=lambda item: (item.num_parameters, item.num_tokens))
    others = [item for item in measured if item != largest]
    if not is_enough(others):
        return None
    return fit_law(others).loss(largest.num_parameters, largest.num_tokens) / largest.loss - 1


def _measured(rung: Rung, loss: float) -> Measured:
    return Measured(rung.size.num_parameters, rung.num_tokens, loss)


def _loss(law: ScalingLaw, rung: Rung) -> float:
    return law.loss(rung.size.num_parameters, rung.num_tokens)


def _interval(law: ScalingLaw, again: Sequence[ScalingLaw], rung: Rung) -> Interval:
    losses = sorted(_loss(other, rung) for other in again)
    edge = (1 - LEVEL) / 2
    return Interval(
        _loss(law, rung),
        losses[math.floor(edge * (len(losses) - 1))],
        losses[math.ceil((1 - edge) * (len(losses) - 1))],
    )
