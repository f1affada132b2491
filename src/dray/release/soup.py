"""One model from several: the mean of their weights, as a new run of the store with its parents on
record.

`uniform` takes all of them. `greedy` (Wortsman et al. 2022, Model soups, algorithm 1) begins with
the best by the metric and takes each next one if the mean with it is not worse, so that it is never
worse than its best ingredient on the rows that it was chosen by. Refuses models that are not alike,
and ones whose held-out rows are not the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dray.cluster.connection import connect
from dray.cluster.needs import Needs
from dray.errors import SpecError
from dray.models.adapters import merge
from dray.models.config import make_kept_config
from dray.release.compress.keeping import make_compressed_spec, make_metadata, weight_tensors
from dray.release.compress.table import Measured, Rows, compare, measure_groups
from dray.release.evaluate import held_out, prepare_other
from dray.release.trained import Trained, Weights, base_of, open_trained
from dray.runs import CheckpointReader
from dray.runs.checkpoint_choice import read_step
from dray.runs.finished import check_name_free, create_finished, holding_name
from dray.spec import Direction
from dray.storage.filesystem import exists, open_filesystem, read_bytes

How = Literal["uniform", "greedy"]
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


@dataclass(frozen=True)
class Ingredient:
    """A run at a step."""

    run: str
    step: str | int | None = None

    @classmethod
    def read(cls, words: str) -> Ingredient:
        """`RUN`, `RUN@STEP` or `RUN@best`. Raises SpecError."""
        run, at, step = words.partition("@")
        return cls(run, read_step(step, words) if at else None)


def soup(
    storage: str,
    ingredients: Sequence[Ingredient],
    new_name: str,
    *,
    how: How = "uniform",
    metric: str | None = None,
    weights: Weights = "trained",
    data: Sequence[str] | None = None,
    address: str | None = None,
    verbose: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Make the run `new_name` of the mean of the ingredients' weights.

    `metric`: by which they are ranked and a greedy soup is chosen; the first run's own
    (`validation.metric`) by itself. `data`: other data to measure on than the held-out rows.
    Returns the table that the run keeps: each ingredient with its value and whether it is in, and
    the metrics of the best one alone and of the soup, with paired intervals. Raises UserError,
    before any work is done, for what cannot be.
    """
    if len(ingredients) < 2:
        raise SpecError("dray soup", "is of two models or more", "a mean of one is that one")
    check_name_free(storage, new_name)
    opened = [
        open_trained(storage, one.run, one.step, weights, unpacked=True) for one in ingredients
    ]
    _check_alike(opened, same_rows=not data)
    first = opened[0]
    if apart := [one.run.name for one in opened if base_of(one) != base_of(first)]:
        say(
            f"{', '.join(apart)} began with other weights than {first.run.name}: what lies between "
            "models that never were the same is seldom a good one"
        )
    metric = metric or first.spec.validation.metric
    better = _direction(first, metric)
    with ExitStack() as stack:
        if data:
            stack.enter_context(connect(address, num_cpus=1, worker=Needs({}), verbose=verbose))
        measured_on = prepare_other(first, data, storage) if data else held_out(first)
        for trained in opened:
            stack.enter_context(trained.run.hold(trained.checkpoint))
        rows = Rows(first, first.task, *measured_on)
        run, driver = stack.enter_context(holding_name(storage, new_name))
        pot = _Pot(rows, metric, better, say)
        for trained in opened:
            pot.taste(trained)
        pot.cook(how)
        spec = make_compressed_spec(first, new_name)
        model, table = pot.model, pot.table(how)
        metadata = make_metadata(model, {}, spec, first.checkpoint.step)
        if not data:
            metadata["validation"] = {
                name: one["after"]["value"] for name, one in table["metrics"].items()
            }
        told = [
            {"name": "soup", "how": how, "of": [one["model"] for one in table["soup"] if one["in"]]}
        ]
        table |= {"run": new_name, "methods": told, "gate": [], "parent": _parent(first)}
        create_finished(
            run,
            driver,
            spec,
            like=first.run,
            config=make_kept_config(model),
            tensors=weight_tensors(model, {}),
            metadata=metadata,
            step=first.checkpoint.step,
            compressed={
                **_parent(first),
                "attempt": first.checkpoint.attempt,
                "manifest_sha256": pot.tasted[0].manifest_sha256,
                "methods": told,
                "packed": False,
                "parents": [
                    {**_parent(one.trained), "manifest_sha256": one.manifest_sha256}
                    for one in pot.tasted
                ],
            },
            table=table,
        )
    return table


def _parent(trained: Trained) -> dict[str, Any]:
    return {"run": trained.run.name, "step": trained.checkpoint.step}


@dataclass
class _Tasted:
    """An ingredient that was measured."""

    trained: Trained
    manifest_sha256: str
    measured: Measured
    is_in: bool = False
    with_it: float | None = None
    """The metric of the mean with it, where that was tried."""

    @property
    def called(self) -> str:
        return f"{self.trained.run.name}@{self.trained.checkpoint.step}"


class _Pot:
    """The ingredients, and the model that is made of them. One of them is read at a time."""

    def __init__(
        self, rows: Rows, metric: str, better: Direction, say: Callable[[str], None]
    ) -> None:
        self._rows, self._metric, self._say = rows, metric, say
        self._sign = 1 if better == "lower" else -1
        self.tasted: list[_Tasted] = []
        self.model: Any = None
        self._device = rows.trained.move_to_device()
        self._measured: Measured | None = None

    def taste(self, trained: Trained) -> None:
        """Measure an ingredient alone."""
        model = _whole_model(trained)
        measured = measure_groups(self._rows, model.to(self._device), self._device)
        with CheckpointReader(trained.run, trained.checkpoint) as reader:
            tasted = _Tasted(trained, reader.manifest_sha256, measured)
        self.tasted.append(tasted)
        self._say(f"{tasted.called}: {self._metric} {_shown(measured.values.get(self._metric))}")
        self.model = model

    def cook(self, how: How) -> None:
        """Make the model: the mean of those that are taken."""
        ranked = sorted(self.tasted, key=self._score)
        total, taken = _states(_whole_model(ranked[0].trained)), 1
        total = {name: value.double() for name, value in total.items()}
        ranked[0].is_in, best = True, self._score(ranked[0])
        self._measured = ranked[0].measured
        for one in ranked[1:]:
            states = _states(_whole_model(one.trained))
            tried = {name: value + states[name].double() for name, value in total.items()}
            if how == "greedy":
                found = self._measure(tried, taken + 1)
                value = found.values.get(self._metric)
                score = float("inf") if value is None else self._sign * value
                one.with_it = value
                self._say(f"with {one.called}: {self._metric} {_shown(value)}")
                if score > best:
                    continue
                best, self._measured = score, found
            total, taken, one.is_in = tried, taken + 1, True
        if how == "uniform":
            self._measured = self._measure(total, taken)
        else:
            self._fill(total, taken)

    def table(self, how: How) -> dict[str, Any]:
        """What became of it."""
        best = min(self.tasted, key=self._score)
        assert self._measured is not None
        return {
            "metric": self._metric,
            "how": how,
            "best": best.called,
            "num_rows": self._rows.split.num_rows,
            "metrics": compare(self._rows.task, best.measured, self._measured),
            "soup": [
                {
                    "model": one.called,
                    "value": one.measured.values.get(self._metric),
                    "in": one.is_in,
                    "with_it": one.with_it,
                }
                for one in sorted(self.tasted, key=self._score)
            ],
        }

    def _score(self, one: _Tasted) -> float:
        """The lower the better; what is undefined comes last."""
        value = one.measured.values.get(self._metric)
        return float("inf") if value is None else self._sign * value

    def _measure(self, total: Mapping[str, Tensor], number: int) -> Measured:
        self._fill(total, number)
        return measure_groups(self._rows, self.model, self._device)

    @torch.no_grad()
    def _fill(self, total: Mapping[str, Tensor], number: int) -> None:
        for name, tensor in _tensors(self.model).items():
            mean = total[name] / number
            # A buffer of whole numbers counts something: the mean is the nearest one.
            tensor.copy_(mean if tensor.is_floating_point() else mean.round())


def _whole_model(trained: Trained) -> Any:
    """A model in fp32 with its adapters in its weights, read anew: nothing keeps it."""
    fresh = open_trained(
        trained.run.storage,
        trained.run.name,
        trained.checkpoint.step,
        trained.weights,
        unpacked=True,
    )
    model = fresh.model
    if hasattr(model, "dray_adapted"):
        merge(model)
    return model


def _tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once."""
    return {name: p.data for name, p in model.named_parameters()} | dict(model.named_buffers())


def _states(model: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in _tensors(model).items()}


def _check_alike(opened: Sequence[Trained], *, same_rows: bool) -> None:
    """Raise SpecError for models whose mean stands for nothing."""
    first = opened[0]
    seen: set[tuple[str, int, int]] = set()
    for trained in opened:
        info = trained.checkpoint
        place = (trained.run.name, info.step, info.attempt)
        if place in seen:
            raise SpecError(f"{trained.run.name}@{info.step}", "is named twice", "each counts once")
        seen.add(place)
        if (made := trained.run.compressed()) is not None and made["packed"]:
            raise SpecError(
                f"run {trained.run.name!r}",
                "has its weights as codes",
                "codes have no mean",
                f"take {made['run']}",
            )
        for what, ours, theirs in (
            ("learns another task", first.spec.task, trained.spec.task),
            ("has another architecture or size", _shape(first), _shape(trained)),
            ("has another tokeniser", _tokens(first), _tokens(trained)),
            ("has other classes", first.manifest.labels, trained.manifest.labels),
        ):
            if ours != theirs:
                raise SpecError(
                    f"run {trained.run.name!r}",
                    f"{what} than {first.run.name}",
                    "a mean is of weights that mean the same",
                    "name runs that differ in their training alone",
                )
        if same_rows and _held_out(trained) != _held_out(first):
            raise SpecError(
                f"run {trained.run.name!r}",
                f"holds out other rows than {first.run.name}",
                "one may have learnt what the other holds out",
                "name data that none of them has seen with --data",
            )


def _held_out(trained: Trained) -> Any:
    split = trained.manifest.validation
    return split and [shard.sha256 for source in split.sources for shard in source.shards]


def _shape(trained: Trained) -> Any:
    kept = (trained.run.model() or {}).get("config", {})
    fields = {name: value for name, value in kept.items() if name not in _NOT_THE_MODEL}
    return {name: value for name, value in fields.items() if "drop" not in name}


def _tokens(trained: Trained) -> Any:
    """What tells tokenisers apart: their tokens by id. A copy may be written in other words."""
    if not trained.spec.task.tokenizes:
        return None
    filesystem, path = open_filesystem(trained.tokenizer_folder)
    file = f"{path}/tokenizer.json"
    if not exists(filesystem, file):
        return trained.manifest.vocab_size
    kept = json.loads(read_bytes(filesystem, file))
    added = {one["content"]: one["id"] for one in kept.get("added_tokens", ())}
    return kept["model"].get("vocab"), added


def _direction(trained: Trained, metric: str) -> Direction:
    found = trained.task.metrics.get(metric)
    if found is None:
        known = ", ".join(trained.task.metrics)
        raise SpecError("--metric", f"{metric} is none of {trained.task.name}", f"it has {known}")
    return found


def _shown(value: float | None) -> str:
    return "undefined on these rows" if value is None else f"{value:.6g}"
