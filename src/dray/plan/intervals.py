"""How often to save: the interval that loses the least time to saves and to failures together.

Pure arithmetic. What a save costs and what a restart takes come from the caller, measured or
planned; how often a rank fails is a published rate until the run's own history says more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

PRIOR_RANK_HOURS = 54 * 24 * 16_384 / 419
"""Hours of a rank between two failures, before a run has shown its own: Llama 3 405B was stopped
419 times in 54 days on 16,384 GPUs by what nobody had planned (Grattafiori et al. 2024,
arXiv:2407.21783, section 3.3.4), once in 50,677 GPU hours. Nothing of the kind is published for
ranks on CPUs or on machines that are lent until somebody pays more: for them it is assumed, and
their own failures correct it."""
PRIOR_SIGMA = math.log(10)
"""How far a run's rate may lie from that, as the standard deviation of its logarithm: a factor of
ten. Machines that are lent fail a thousand times as often; a gamma prior, of whatever weight, would
take as many of the run's failures as hours of the published rate to be talked out of that."""
_STEP, _BELOW, _ABOVE = 0.02, 700, 1100
"""Of the grid over the rate's logarithm on which that is integrated."""
LEAST_SECONDS, MOST_SECONDS = 60.0, 3600.0
"""No interval is shorter or longer. Beyond an hour less than a thousandth is gained where a save
holds training up for three seconds, and a rate that was assumed too low would cost hours."""
FIRST_SECONDS = 600.0
"""The longest interval before a save has been measured."""
WRITES = 2.0
"""An interval is at least so many times as long as a save takes until it is committed: saves are
written beside training, one at a time, and take bandwidth and CPUs from it that no rank's clock
shows."""


@dataclass(frozen=True)
class FailureRate:
    """How often one rank fails, by what is assumed and what was seen."""

    failures: int = 0
    rank_hours: float = 0.0
    """Hours that ranks worked, over all of them, while these failures were seen."""

    @property
    def hours(self) -> float:
        """Hours of a rank between two failures: one over the mean of the rate, by a log-normal
        prior whose mean is the published rate and by the Poisson process that was seen. The mean,
        since what failures cost grows in proportion to their rate."""
        middle = -math.log(PRIOR_RANK_HOURS) - PRIOR_SIGMA**2 / 2
        logs = [middle + _STEP * place for place in range(-_BELOW, _ABOVE + 1)]
        likely = [
            self.failures * log
            - self.rank_hours * math.exp(log)
            - ((log - middle) / PRIOR_SIGMA) ** 2 / 2
            for log in logs
        ]
        most = max(likely)
        weights = [math.exp(value - most) for value in likely]
        rates = [weight * math.exp(log) for weight, log in zip(weights, logs, strict=True)]
        return sum(weights) / sum(rates)

    def mean_seconds(self, num_ranks: int) -> float:
        """Mean time between failures of a group, which ends with any of its ranks."""
        return 3600 * self.hours / num_ranks


class SaveInterval(BaseModel):
    """How often to save, and what that goes by. Times in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float
    """Between two saves."""
    held_seconds: float
    """Training waits for so long at a save."""
    commit_seconds: float
    """From the begin of a save to its commit, beside training."""
    restart_seconds: float
    """From a failure to the first step after it."""
    failure_seconds: float
    """Mean time between failures of the whole group."""
    goodput: float
    """Share of the time in which steps are done that count, as expected."""


def daly_interval(held_seconds: float, failure_seconds: float) -> float:
    """Seconds of work between two saves that make a run the shortest, by J. T. Daly, "A higher
    order estimate of the optimum checkpoint interval for restart dumps" (Future Generation Computer
    Systems 22, 2006, equation 37). Its first order is J. W. Young's √(2·δ·M) (CACM 17, 1974).

    `held_seconds`: δ, for which a save holds training up. `failure_seconds`: M, the mean time
    between failures. How long a restart takes moves the optimum not at all.
    """
    if held_seconds >= 2 * failure_seconds:
        return failure_seconds
    ratio = held_seconds / (2 * failure_seconds)
    young = math.sqrt(2 * held_seconds * failure_seconds)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - held_seconds


def expected_goodput(
    seconds: float, *, held_seconds: float, failure_seconds: float, lost_seconds: float
) -> float:
    """Share of the time that goes into steps that count, with saves every `seconds` of work, by
    Daly's complete model (ibid., equation 20) for failures that come at any time alike:

        τ / (M · exp(R / M) · (exp((τ + δ) / M) − 1))

    `lost_seconds`: R, what a failure takes besides the work since the newest save. A save that was
    under way is none, so R is the restart and the time until a save is committed.
    """
    exponent = (seconds + held_seconds) / failure_seconds
    if exponent + lost_seconds / failure_seconds > 500:  # it never gets through
        return 0.0
    spent = failure_seconds * math.exp(lost_seconds / failure_seconds) * math.expm1(exponent)
    return seconds / spent


def choose_interval(
    *,
    held_seconds: float,
    commit_seconds: float,
    restart_seconds: float,
    failure_seconds: float,
    most_seconds: float = MOST_SECONDS,
) -> SaveInterval:
    """The interval of Daly's estimate within its limits, and what is to be expected of it."""
    least = max(LEAST_SECONDS, WRITES * commit_seconds)
    best = daly_interval(held_seconds, failure_seconds)
    seconds = max(least, min(best, most_seconds))
    return SaveInterval(
        seconds=seconds,
        held_seconds=held_seconds,
        commit_seconds=commit_seconds,
        restart_seconds=restart_seconds,
        failure_seconds=failure_seconds,
        goodput=expected_goodput(
            seconds,
            held_seconds=held_seconds,
            failure_seconds=failure_seconds,
            lost_seconds=restart_seconds + commit_seconds,
        ),
    )
