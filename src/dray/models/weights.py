"""Weights that a model starts from: named tensors of whatever origin, read into it one at a time.

At most one tensor lies in memory besides the model, also under ZeRO-3. Refused are weights that
lack a part of the backbone or hold it in other shapes; a new head is initialised, and what was left
over is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dray.errors import SpecError
from dray.models.initialize import Gathering, draws_here, initialize_weights, restore_rotary_buffers


@dataclass(frozen=True)
class Stored:
    """One tensor that may be taken."""

    target: str
    """What the model calls it."""
    name: str
    """What it is called where it lies."""
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Weights(Protocol):
    """Where the tensors lie."""

    @property
    def key(self) -> str:
        """The key of the spec that names them."""

    @property
    def name(self) -> str:
        """As a message names them."""

    def config(self) -> Mapping[str, Any]:
        """The configuration that they were made for."""

    def open(
        self, model: Any, opened: ExitStack, *, headers_only: bool = False
    ) -> Sequence[Stored]:
        """What there is, under the names that the model has for it; files stay open with `opened`.
        `headers_only`: nothing where that cannot be told from headers. Raises UserError."""


@dataclass(frozen=True)
class LoadReport:
    """What became of the weights: names in the model, names where they lay."""

    origin: str
    num_taken: int
    not_taken: tuple[str, ...]
    initialized: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{self.num_taken} tensors taken from {self.origin}"]
        if self.not_taken:
            parts.append(f"{len(self.not_taken)} left: {_some(self.not_taken)}")
        if self.initialized:
            parts.append(f"{len(self.initialized)} new: {_some(self.initialized)}")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"report": str(self)}


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join([*names[:most], *(["…"] if len(names) > most else [])])


def load_weights(model: Any, weights: Weights, seed: int, gathering: Gathering) -> LoadReport:
    """Copy weights into a constructed model. Raises UserError before anything was copied.

    Parameters that they do not have (a new head) get their initial weights of `seed`; so does a
    head whose classes are the model's in another order.
    """
    with ExitStack() as opened:
        found, not_taken, missing = _chosen(model, weights, weights.open(model, opened))
        if missing:
            initialize_weights(model, seed, gathering)
        else:
            restore_rotary_buffers(model)
        with torch.no_grad():
            for name, stored in found.items():
                _copy(model, name, stored, gathering)
    model.tie_weights()
    return LoadReport(weights.name, len(found), tuple(sorted(not_taken)), missing)


def check_fit(model: Any, weights: Weights) -> None:
    """Raise SpecError for weights that are not those of the model, which may lie on the meta
    device. Reads headers alone."""
    with ExitStack() as opened:
        if stored := weights.open(model, opened, headers_only=True):
            _chosen(model, weights, stored)


def _chosen(
    model: Any, weights: Weights, stored: Sequence[Stored]
) -> tuple[dict[str, Stored], list[str], tuple[str, ...]]:
    """(the tensors to take by their names in the model, the names of those to leave, the names that
    need initial weights). Raises SpecError."""
    targets = shapes_of(model)
    found, not_taken = _matched(model, weights, targets, stored)
    for name in _other_outputs(weights.config(), model, found):
        not_taken.append(found.pop(name).name)
    tied = _tied_groups(model, targets)
    for source in {members[0] for members in tied.values()} - set(found):
        for member in tied[source]:  # stored under the name that is tied to, not the one that ties
            if member in found:
                found[source] = found.pop(member)
    taken = {member for name in found for member in tied.get(name, (name,))}
    missing = tuple(name for name in targets if name not in taken)
    _check_backbone(model, weights, missing, len(targets))
    return found, not_taken, missing


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """Full shapes of everything that is stored: parameters under all their names, and
    persistent buffers."""
    shapes = {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if leaf not in model.get_submodule(owner)._non_persistent_buffers_set:
            shapes[name] = tuple(buffer.shape)
    return shapes


def _tied_groups(model: Any, targets: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """For each tied parameter the names that share its values once the model is tied."""
    pairs = [
        (target, source)
        for target, source in model.all_tied_weights_keys.items()
        if target in targets
    ]
    groups: dict[str, tuple[str, ...]] = {}
    for source in dict.fromkeys(source for _, source in pairs):
        members = tuple(dict.fromkeys((source, *(t for t, s in pairs if s == source))))
        groups |= dict.fromkeys(members, members)
    return groups


def _matched(
    model: Any,
    weights: Weights,
    targets: Mapping[str, tuple[int, ...]],
    stored: Sequence[Stored],
) -> tuple[dict[str, Stored], list[str]]:
    """The tensors to take, by their names in the model, and the names of those to leave. Raises
    SpecError."""
    found: dict[str, Stored] = {}
    not_taken: list[str] = []
    for tensor in stored:
        name = tensor.target
        if name not in targets:
            not_taken.append(tensor.name)
        elif targets[name] == tensor.shape:
            found[name] = tensor
        elif _in_backbone(model, name):
            raise SpecError(
                weights.key,
                f"{tensor.name} has shape {list(tensor.shape)}, not {list(targets[name])}",
                "weights and configuration must agree",
            )
        else:
            not_taken.append(tensor.name)
    return found, not_taken


def _other_outputs(theirs: Mapping[str, Any], model: Any, found: Mapping[str, Stored]) -> list[str]:
    """The part of the head that was trained for other outputs than the model's: the whole of it
    where classes stand in another order, and of another task's what gives values for classes, even
    if these are as many."""
    if model.base_model is model:  # it has no outputs
        return []
    head = [name for name in found if not name.startswith(f"{model.base_model_prefix}.")]
    if _classes_moved(theirs, model.config):
        return head
    ours = type(model).__name__
    if (theirs.get("architectures") or [ours])[0] == ours:
        return []
    return [name for name in head if found[name].shape[:1] == (model.config.num_labels,)]


def _classes_moved(theirs: Mapping[str, Any], config: Any) -> bool:
    """Whether the classes of the configuration that weights were made for have the names of the
    model's, but in another order."""
    named = theirs.get("id2label")
    if not isinstance(named, Mapping):
        return False  # no classifier's
    before = [str(named[key]).casefold() for key in sorted(named, key=int)]
    now = [str(config.id2label[index]).casefold() for index in sorted(config.id2label)]
    return before != now and sorted(before) == sorted(now)


def _in_backbone(model: Any, name: str) -> bool:
    # Poolers are part of a head in all but name: language models are saved without.
    is_body = model.base_model is model  # built without a head, its names have no prefix
    return (is_body or name.startswith(f"{model.base_model_prefix}.")) and "pooler" not in name


def name_in(model: Any, name: str, known: Collection[str]) -> str:
    """What a model calls a tensor of another model on the same body, of which one may be the body
    itself: its names have no prefix."""
    prefix = f"{model.base_model_prefix}."
    others = (name, name.removeprefix(prefix), f"{prefix}{name}")
    return next((other for other in others if other in known), name)


def _check_backbone(
    model: Any, weights: Weights, missing: tuple[str, ...], num_targets: int
) -> None:
    lacking = [name for name in missing if _in_backbone(model, name)]
    if lacking:
        raise SpecError(
            weights.key,
            f"{weights.name} lacks {len(lacking)} of {num_targets} tensors, such as {lacking[0]}",
            "weights must hold the whole backbone of their configuration",
        )


def _copy(model: Any, name: str, stored: Stored, gathering: Gathering) -> None:
    owner_name, _, leaf = name.rpartition(".")
    target = getattr(model.get_submodule(owner_name), leaf)
    with gathering([target]) if isinstance(target, torch.nn.Parameter) else ExitStack():
        if draws_here(target):
            target.data.copy_(stored.read())
