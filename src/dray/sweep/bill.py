"""What a sweep will take, before anything of it is started: trials, hours, money and disk, by the
plan of one of its trials. Light: `dray plan` asks for it.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from dray.plan import Cost, Demands, Plan, format_bytes, format_money, format_seconds
from dray.sweep.space import Space


class Bill(BaseModel):
    """What all trials of a sweep take together. `least`: if all that may be stopped early are
    stopped at the first look; `most`: if none is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_trials: int | None
    """None: other limits than their number end it."""
    hours: float | None
    """Of the clock, after which it ends whatever was tried; how much that is depends on how many
    trials run at once. None: no such limit."""
    limit: str
    """Which limit of the budget ends it, if it is not the number of trials."""
    trial_seconds: float | None
    """Of a trial that goes to its end, failures included; None: not known."""
    least_seconds: float | None
    """Of all trials, one after the other."""
    most_seconds: float | None
    most_worker_hours: float | None
    least_money: float | None
    """None: an hour has no price, or the time is not known."""
    most_money: float | None
    currency: str = ""
    checkpoints_bytes: int | None
    """Of all trials: what each keeps stays until the sweep is deleted."""

    def describe(self) -> list[str]:
        """Lines for a person."""
        trials = "trials" if self.num_trials is None else f"{self.num_trials} trials"
        lines = [f"{trials} of up to {_time(self.trial_seconds)} each{self._because()}"]
        if self.most_seconds is not None and self.most_worker_hours is not None:
            span = f"{_time(self.least_seconds)} to {_time(self.most_seconds)}"
            lines.append(
                f"{span if self._may_stop else _time(self.most_seconds)} of trials one after the "
                f"other, {self.most_worker_hours:.3g} worker hours at most"
            )
        if self.most_money is not None and self.least_money is not None:
            most = format_money(self.most_money, self.currency)
            least = f"{format_money(self.least_money)} to " if self._may_stop else ""
            lines.append(f"{least}{most} in all")
        if self.hours is not None:
            lines.append(f"no more than {self.hours:g} hours of the clock")
        if self.checkpoints_bytes is not None:
            lines.append(f"{format_bytes(self.checkpoints_bytes)} of checkpoints at most")
        return lines

    @property
    def _may_stop(self) -> bool:
        return self.least_seconds != self.most_seconds

    def _because(self) -> str:
        return f", until the budget of {self.limit} is used up" if self.limit else ""


def _time(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else format_seconds(seconds)


def make_bill(space: Space, plan: Plan, demands: Demands, cost: Cost | None = None) -> Bill:
    """What a sweep of a planned spec takes. `cost`: of one trial; without one the budget's own
    price is gone by."""
    seconds = demands.seconds_with_failures or plan.est_seconds
    price = cost.price_per_hour if cost else plan.num_ranks * (space.budget.price_per_hour or 0.0)
    whole, limit = _whole_trials(space, plan, seconds, price)
    least = most = None
    if whole is not None and seconds is not None:
        most = whole * seconds
        stops = space.scheduler.name not in ("none", "pbt")
        steps = plan.num_steps or 1
        least = most * min(1.0, space.scheduler.first_look(steps) / steps if stops else 1.0)
    count = space.num_trials
    return Bill(
        num_trials=count,
        hours=space.budget.hours,
        limit=limit,
        trial_seconds=seconds,
        least_seconds=least,
        most_seconds=most,
        most_worker_hours=None if most is None else most / 3600 * plan.num_ranks,
        least_money=None if least is None or not price else least / 3600 * price,
        most_money=None if most is None or not price else most / 3600 * price,
        currency=cost.currency if cost else "",
        checkpoints_bytes=None if count is None else count * demands.checkpoints_bytes,
    )


def _whole_trials(
    space: Space, plan: Plan, seconds: float | None, price: float
) -> tuple[float | None, str]:
    """How many whole trials the budget allows, and by which of its limits if not by their number.
    Hours of the clock depend on how many trials run at once, and are no limit here."""
    budget, found = space.budget, dict[str, float]()
    if space.num_trials is not None:
        found[""] = float(space.num_trials)
    if budget.steps is not None and plan.num_steps:
        found["steps"] = budget.steps / plan.num_steps
    if budget.tokens is not None and plan.num_tokens:
        found["tokens"] = budget.tokens / plan.num_tokens
    gpus = plan.num_ranks if plan.on_gpu else 0
    if budget.gpu_hours is not None and seconds and gpus:
        found["gpu_hours"] = budget.gpu_hours / (seconds / 3600 * gpus)
    if budget.money is not None and seconds and price:
        found["money"] = budget.money / (seconds / 3600 * price)
    if not found:
        return None, ""
    limit = min(found, key=lambda name: found[name])
    return found[limit], limit
