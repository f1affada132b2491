"""What a sweep tries, how it searches, when it stops trials, and what it may cost.

A space is a YAML file, or one of the packaged ones by name. Its form is checked here, and against
the spec that it is for, before anything starts.
"""

from __future__ import annotations

import difflib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from dray.errors import SpecError
from dray.plan import LAWFUL, Law
from dray.spec import (
    Float,
    Int,
    Packaged,
    Section,
    Spec,
    load_tree,
    make_spec,
    shown_words,
    translate,
    with_value,
)

Value = Any
"""What a spec's key may hold: a number, a text, true, false, null, or a list of these."""
KINDS = ("loguniform", "uniform", "quniform", "randint", "choice", "grid")
OVERRIDE = "space."
"""How an override of a space's key begins on the command line."""
FIXED = ("name", "tracking", "validation.metric", "checkpoint", "watchdog")
"""Keys that do not change what a trial learns: to sweep them compares nothing."""
PROBES = 64
"""So many specs of values drawn at random are looked at before a sweep starts."""
SPACES = Packaged("dray.tune_spaces", "space", "a space is a UTF-8 text file of YAML")


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of a command line for the spec, and those for the space, without what marks
    them."""
    of_space = [item.removeprefix(OVERRIDE) for item in overrides if item.startswith(OVERRIDE)]
    return [item for item in overrides if not item.startswith(OVERRIDE)], of_space


class Parameter(Section):
    """The values that one key of the spec may have: one of the six kinds."""

    loguniform: tuple[Float, Float] | None = None
    """Between two numbers, each order of magnitude as likely as another."""
    uniform: tuple[Float, Float] | None = None
    """Between two numbers."""
    quniform: tuple[Float, Float, Float] | None = None
    """From the first to the second number, in steps of the third."""
    randint: tuple[Int, Int] | None = None
    """A whole number from the first one on, below the second."""
    choice: tuple[Value, ...] | None = None
    """One of these. Numbers in ascending order are searched as an order."""
    grid: tuple[Value, ...] | None = None
    """Each of these as often as the others, whatever the search."""
    around: Literal["law"] | None = None
    """`law`: the numbers are factors of what the Step Law says of the spec, for its learning rate
    and its batch."""
    when: dict[str, Value] = Field(default={})
    """The key counts only where other keys have these values (a list: one of them): keys of the
    space, or of the spec."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        """Paths have dots of their own, by which no near name would be found."""
        for key in given if isinstance(given, Mapping) else ():
            if key not in (*KINDS, "when", "around"):
                near = difflib.get_close_matches(str(key), KINDS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KINDS)}"
                raise ValueError(f"unknown kind {key}; {hint}")
        return given

    @model_validator(mode="after")
    def _sound(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"one of {', '.join(KINDS)} is wanted"
                + (f", not {' and '.join(given)}" if given else "")
            )
        kind = given[0]
        values = getattr(self, kind)
        if self.around and kind not in ("loguniform", "uniform", "choice", "grid"):
            raise ValueError(
                f"{kind} is around nothing: loguniform, uniform, choice and grid can be"
            )
        if kind in ("choice", "grid"):
            if not values:
                raise ValueError(f"{kind} is empty: give at least one value")
            return self
        low, high = values[0], values[1]
        if low >= high:
            raise ValueError(
                f"{kind} [{low:g}, {high:g}] is empty: the first number lies below the second"
            )
        if kind == "loguniform" and low <= 0:
            raise ValueError(f"loguniform [{low:g}, {high:g}]: both numbers are above 0")
        if kind == "quniform" and not 0 < values[2] <= high - low:
            raise ValueError(f"quniform: a step of {values[2]:g} does not fit into the range")
        return self

    def times(self, factor: float, *, whole: bool) -> Parameter:
        """The same around a number, which its own numbers are factors of."""

        def made(value: float) -> float:
            return max(1, round(value * factor)) if whole else rounded(value * factor)

        values = tuple(dict.fromkeys(made(value) for value in getattr(self, self.kind)))
        return Parameter.model_validate({self.kind: values, "when": self.when})

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def listed(self) -> tuple[Value, ...] | None:
        """The values one by one, where there are so many of them."""
        return self.choice if self.choice is not None else self.grid

    @property
    def is_ordered(self) -> bool:
        """Whether the listed values are numbers that ascend."""
        listed = self.listed or ()
        numbers = [value for value in listed if type(value) in (int, float)]
        return len(numbers) == len(listed) > 1 and all(
            before < after for before, after in itertools.pairwise(numbers)
        )

    def ends(self) -> tuple[Value, ...]:
        """Values by which one sees whether a spec takes them: the ends of a range, or all."""
        if self.listed is not None:
            return self.listed
        low, high = getattr(self, self.kind)[:2]
        return (low, high - 1) if self.randint is not None else (low, high)

    def draw(self, chance: random.Random) -> Value:
        """A value, evenly."""
        if self.listed is not None:
            return chance.choice(self.listed)
        if self.randint is not None:
            return chance.randrange(*self.randint)
        low, high = getattr(self, self.kind)[:2]
        if self.loguniform is not None:
            return rounded(math.exp(chance.uniform(math.log(low), math.log(high))))
        return self.nearest(chance.uniform(low, high))

    def nearest(self, value: float) -> Value:
        """The value of a range that is nearest to a number."""
        low, high = self.ends()
        value = min(max(value, low), high)
        if self.randint is not None:
            return round(value)
        if self.quniform is not None:
            step = self.quniform[2]
            value = min(high, low + step * round((value - low) / step))
        return rounded(value)


class Tie(Section):
    """A key that follows another one."""

    to: str
    """The key that it follows: another key of the space, a number."""
    rule: Literal["sqrt", "linear"] = "sqrt"
    """The value is drawn for what `to` is in the spec; for another one it is multiplied by their
    quotient (`linear`) or its square root."""


class Search(Section):
    """How values are drawn."""

    name: Literal["random", "grid", "tpe", "cmaes", "bohb"] = "tpe"
    """`tpe` and `cmaes` go by what earlier trials have shown; `grid` tries every combination."""
    seed: Annotated[Int, Field(ge=0)] = 0
    """The draws of a trial follow from this seed, its number and what is known by then."""
    startup_trials: Annotated[Int, Field(ge=1)] = 8
    """So many trials of `tpe` are drawn at random before it goes by them."""

    @model_validator(mode="after")
    def _kept(self) -> Self:
        if self.name == "bohb":
            raise ValueError(
                "bohb: the library that it needs (hpbandster) has been given up; `search: tpe` "
                "with `scheduler: hyperband` is the same idea, a model of good values in brackets"
            )
        return self


class Scheduler(Section):
    """When a trial that falls behind is stopped."""

    name: Literal["asha", "hyperband", "median", "pbt", "none"] = "asha"
    """`asha`: at each rung only the best of `reduction_factor` go on; `hyperband`: the same in
    brackets that begin at other rungs; `median`: what is worse than the median is stopped; `pbt`: a
    population whose worst go on from the checkpoints of the best, with values near theirs."""
    reduction_factor: Annotated[Float, Field(gt=1)] = 3
    """Of so many trials one goes on; rungs lie so many times apart."""
    grace_steps: Annotated[Int, Field(ge=1)] | None = None
    """No trial is stopped before; the first rung. In steps of the spec's own batch: a trial with a
    batch twice as large has come as far in half as many. None: the whole run divided twice by
    `reduction_factor`."""
    brackets: Annotated[Int, Field(ge=1, le=8)] = 3
    """Of `hyperband`."""
    least_trials: Annotated[Int, Field(ge=1)] = 3
    """`median` needs so many others to compare with."""
    population: Annotated[Int, Field(ge=2)] = 8
    """Of `pbt`: so many lines of trials."""
    every_steps: Annotated[Int, Field(ge=1)] | None = None
    """Of `pbt`: the lines are compared every so many steps. None: a fifth of the run."""
    quantile: Annotated[Float, Field(gt=0, le=0.5)] = 0.25
    """Of `pbt`: this share of the lines, the worst, goes on from this share, the best."""
    resample: Annotated[Float, Field(ge=0, le=1)] = 0.25
    """Of `pbt`: how likely a value is drawn anew …"""
    factors: tuple[Annotated[Float, Field(gt=0)], Annotated[Float, Field(gt=0)]] = (0.8, 1.25)
    """… instead of being multiplied by one of these."""

    def first_look(self, total_steps: int) -> int:
        """The step at which trials of so many are first compared: a population's interval, the
        first rung of the others."""
        if self.name == "pbt":
            return self.every_steps or max(1, total_steps // 5)
        return self.grace_steps or max(1, round(total_steps / self.reduction_factor**2))


class Budget(Section):
    """What a sweep may cost: it begins no further trial once one of these is used up."""

    trials: Annotated[Int, Field(ge=1)] | None = None
    """Trials, repeats among them."""
    hours: Annotated[Float, Field(gt=0)] | None = None
    """Hours of the clock, over all starts of the sweep; trials at work are stopped then."""
    steps: Annotated[Int, Field(ge=1)] | None = None
    """Steps of all trials."""
    tokens: Annotated[Int, Field(ge=1)] | None = None
    """Training tokens of all trials."""
    gpu_hours: Annotated[Float, Field(gt=0)] | None = None
    """Hours of all trials, times their GPUs."""
    money: Annotated[Float, Field(gt=0)] | None = None
    """At `price_per_hour`."""
    price_per_hour: Annotated[Float, Field(gt=0)] | None = None
    """Of one worker, with its GPU where it has one."""

    @model_validator(mode="after")
    def _priced(self) -> Self:
        if self.money is not None and self.price_per_hour is None:
            raise ValueError("money needs a price_per_hour")
        return self

    @property
    def is_open(self) -> bool:
        """Whether nothing is limited."""
        limits = (
            self.trials,
            self.hours,
            self.steps,
            self.tokens,
            self.gpu_hours,
            self.money,
        )
        return all(limit is None for limit in limits)


def _as_named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Space(Section):
    """A search space, whole."""

    parameters: dict[str, Parameter] = Field(default={})
    """Dotted path of the spec → its values."""
    points: Annotated[tuple[dict[str, Value], ...], Field(exclude_if=lambda given: not given)] = ()
    """Instead of parameters: values that go together (dotted path → value), each of these tried in
    turn."""
    ties: dict[str, Tie] = Field(default={})
    """Dotted path of the space → what it follows."""
    metric: str | None = None
    """The validation's metric that is compared; none: the spec's `validation.metric`."""
    mode: Literal["min", "max"] | None = None
    """Which way is better; none: the task's own word for that metric."""
    search: Annotated[Search, BeforeValidator(_as_named)] = Search()
    """How values are drawn."""
    scheduler: Annotated[Scheduler, BeforeValidator(_as_named)] = Scheduler()
    """When trials are stopped."""
    budget: Budget = Budget()
    """What it may cost."""
    concurrency: Annotated[Int, Field(ge=1)] | Literal["auto"] = "auto"
    """Trials at once; `auto`: as many as there is room for, or may come."""
    packing: Annotated[Int, Field(ge=1, le=64)] | Literal["auto"] = Field(
        default="auto", exclude_if=lambda given: given == "auto"
    )
    """Trials of one worker that share what a worker has, its GPU, or without one its CPUs; `auto`:
    as many as a GPU's memory holds, four at most; CPUs are not shared."""
    repeats: Annotated[Int, Field(ge=1)] = 1
    """How often each drawing is tried, with another seed each time; means are compared."""
    retries: Annotated[Int, Field(ge=0)] = 1
    """How often a trial that has failed is taken up again, from its last checkpoint."""
    max_failures: Annotated[Int, Field(ge=1)] = 5
    """So many trials lost by one cause end the sweep."""

    @model_validator(mode="before")
    @classmethod
    def _in_turn(cls, given: Any) -> Any:
        """Points are a grid of their own."""
        if isinstance(given, Mapping) and given.get("points") and given.get("search") is None:
            return {**given, "search": {"name": "grid"}}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.points:
            self._check_points()
        elif not self.parameters:
            raise ValueError("parameters is empty: name at least one key of the spec")
        for path, tie in self.ties.items():
            if path not in self.parameters:
                raise ValueError(f"ties.{path}: the space has no such parameter")
            if tie.to not in self.parameters or tie.to == path:
                raise ValueError(f"ties.{path}.to = {tie.to}: another parameter is wanted")
        if self.search.name == "grid":
            endless = [path for path, given in self.parameters.items() if given.listed is None]
            if endless:
                raise ValueError(
                    f"search grid: parameters.{endless[0]} is {self.parameters[endless[0]].kind}; "
                    "a grid needs choice or grid"
                )
        elif self.budget.is_open and self.scheduler.name != "pbt":
            raise ValueError("budget is missing: e.g. budget: {trials: 16}")
        if self.scheduler.name == "pbt" and self.repeats > 1:
            raise ValueError("repeats: a population's lines are not repeated")
        for path, given in self.parameters.items():
            if given.around and path not in LAWFUL:
                raise ValueError(f"parameters.{path}: the law gives {' and '.join(LAWFUL)} alone")
        _ = self.in_order()
        return self

    def _check_points(self) -> None:
        if self.parameters:
            raise ValueError("points: they stand instead of parameters; give one of the two")
        if not all(self.points):
            raise ValueError("points: one of them is empty; name at least one key of the spec")
        if self.search.name != "grid" or self.scheduler.name == "pbt":
            raise ValueError("points: they are tried in turn; leave search and pbt out")

    @property
    def paths(self) -> list[str]:
        """Every key of the spec that trials have values of their own for."""
        return list(dict.fromkeys([*self.parameters, *(key for at in self.points for key in at)]))

    def in_order(self) -> list[str]:
        """The paths, each after those that it depends on. Raises ValueError for a circle."""
        left, done = dict(self.parameters), list[str]()
        while left:
            free = [path for path, given in left.items() if not (given.when.keys() & left.keys())]
            if not free:
                raise ValueError(f"parameters: {' and '.join(left)} depend on each other")
            done += free
            for path in free:
                del left[path]
        return done

    def is_active(self, path: str, drawn: Mapping[str, Value], tree: Mapping[str, Any]) -> bool:
        """Whether a parameter counts beside what has been drawn: of an own key that does not count
        itself nothing depends."""
        for other, wanted in self.parameters[path].when.items():
            if other in self.parameters:
                if other not in drawn:
                    return False
                has = drawn[other]
            else:
                has = find_in(tree, other)
            if not (has in wanted if isinstance(wanted, list) else has == wanted):
                return False
        return True

    def choose(
        self, choose: Callable[[str, Parameter], Value], tree: Mapping[str, Any]
    ) -> dict[str, Value]:
        """A value for each parameter that counts beside those before it. `tree`: the spec, which
        conditions may ask."""
        chosen: dict[str, Value] = {}
        for path in self.in_order():
            if self.is_active(path, chosen, tree):
                chosen[path] = choose(path, self.parameters[path])
        return chosen

    @property
    def num_trials(self) -> int | None:
        """How many trials there will be, as far as the space says it."""
        limits = [self.budget.trials]
        if self.search.name == "grid":
            limits.append(len(self.cells()) * self.repeats)
        return min((limit for limit in limits if limit is not None), default=None)

    def cells(self) -> list[dict[str, Value]]:
        """Every combination of the listed values that a grid goes through: the points, or of all
        parameters under `search: grid`, else of those of the kind `grid`."""
        if self.points:
            return [dict(point) for point in self.points]
        paths = [
            path
            for path, given in self.parameters.items()
            if given.grid is not None or self.search.name == "grid"
        ]
        lists = [self.parameters[path].listed or () for path in paths]
        return [dict(zip(paths, values, strict=True)) for values in itertools.product(*lists)]


def find_in(tree: Mapping[str, Any], path: str) -> Value:
    """The value at a dotted path; none where there is none."""
    node: Any = tree
    for part in path.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def rounded(value: float) -> float:
    """Six digits: what a person can read is what is trained with."""
    return float(f"{value:.6g}")


# ---- loading -----------------------------------------------------------------------------------


def load_space(given: str, overrides: Sequence[str] = ()) -> Space:
    """A space by the path of its file, or by the name of a packaged one, with `key=value` overrides
    of its keys. Raises SpecError."""
    return make_space(load_tree(given, overrides, SPACES), given, overrides)


def make_space(
    tree: Mapping[str, Any], where: str = "space", overrides: Sequence[str] = ()
) -> Space:
    """A space from plain values. Raises SpecError that names the first offending key."""
    try:
        return Space.model_validate(dict(tree))
    except ValidationError as error:
        raise translate(error, where, overrides, Space) from error


# ---- with a spec -------------------------------------------------------------------------------


def with_values(tree: Mapping[str, Any], values: Mapping[str, Value]) -> dict[str, Any]:
    """A spec's tree with other values at some dotted paths."""
    changed = dict(tree)
    for path, value in values.items():
        changed = with_value(changed, path, value)
    return changed


def around_law(space: Space, law: Law) -> Space:
    """The space with the law's numbers in the places that are around it."""
    numbers = law.numbers()
    parameters = {
        path: given.times(numbers[path], whole=path == LAWFUL[1]) if given.around else given
        for path, given in space.parameters.items()
    }
    return space.model_copy(update={"parameters": parameters})


def settle(space: Space, drawn: Mapping[str, Value], spec: Spec) -> dict[str, Value]:
    """What a trial's spec gets for what was drawn: values that are tied to others follow them."""
    settled = dict(drawn)
    for path, tie in space.ties.items():
        if path not in drawn or tie.to not in drawn:
            continue
        quotient = float(drawn[tie.to]) / float(find_in(spec.model_dump(), tie.to))
        factor = math.sqrt(quotient) if tie.rule == "sqrt" else quotient
        settled[path] = rounded(float(drawn[path]) * factor)
    return settled


def check_space(space: Space, tree: Mapping[str, Any], where: str) -> None:
    """Raise SpecError for a space that does not suit the spec: a path that it has not, a value that
    it refuses, a metric that its task lacks, nothing to validate on."""
    spec = make_spec(tree)
    for path in space.paths:
        if any(path == key or path.startswith(f"{key}.") for key in FIXED):
            raise SpecError(
                where,
                f"{'points' if space.points else 'parameters'}: {path}",
                "a sweep compares what changes the result",
                "leave it out",
            )
    for path, tie in space.ties.items():
        for name in (path, tie.to):
            if type(find_in(spec.model_dump(), name)) not in (int, float):
                raise SpecError(where, f"ties.{path}: {name} is no number in the spec")
    if spec.data.validation is None:
        raise SpecError(
            "the spec",
            "data.validation is missing",
            "trials are compared on rows that they were not trained on",
            "e.g. data.validation={share: 0.02}",
        )
    if any(given.around for given in space.parameters.values()) and (why := spec.why_no_law):
        raise SpecError(where, "around: law", why, "give numbers")
    known = spec.task.metrics
    if space.metric is not None and space.metric not in known:
        near = difflib.get_close_matches(space.metric, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
        raise SpecError(where, f"metric = {space.metric}: {spec.task.name} has no such", "", hint)
    for path, given in space.parameters.items():
        for value in given.ends():
            _try(tree, {**_premises(space, path), path: value}, where, f"parameters.{path}")
    for drawn in space.points or _probes(space, tree):
        _try(tree, settle(space, drawn, spec), where, "points" if space.points else "parameters")


def _premises(space: Space, path: str) -> dict[str, Value]:
    """Values of the space under which a parameter counts."""
    found: dict[str, Value] = {}
    for other, wanted in space.parameters[path].when.items():
        if other in space.parameters:
            found |= _premises(space, other)
            found[other] = wanted[0] if isinstance(wanted, list) else wanted
    return found


def _probes(space: Space, tree: Mapping[str, Any]) -> Iterator[dict[str, Value]]:
    chance = random.Random(space.search.seed)
    for _ in range(PROBES):
        yield space.choose(lambda path, given: given.draw(chance), tree)


def _try(tree: Mapping[str, Any], values: Mapping[str, Value], where: str, place: str) -> None:
    """Raise SpecError if the spec refuses these values."""
    try:
        make_spec(with_values(tree, values))
    except SpecError as error:
        shown = ", ".join(f"{key}={shown_words(str(value))}" for key, value in values.items())
        raise SpecError(
            where, f"{place}: the spec refuses {shown} ({error.what})", error.rule, error.way_out
        ) from error
