"""What a private run's ε is: from its noise, which the run keeps, and from how often its order has
used a row.

The noise is a secret of the run: it follows from a key in the run's folder, beside the rows, which
are no less secret. No export has it. A run without privacy has none of this. A fork draws a key of
its own and counts what its origin's steps have spent. Refuses runs whose ε would not be what their
spec says.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from dray.corpus.manifest import Manifest, load_run_manifest
from dray.corpus.stream import make_order
from dray.errors import SpecError, StoreError, UserError
from dray.order import Order
from dray.plan.privacy import epsilon_of, mu_for, mu_of, noise_for
from dray.runs import Run
from dray.runs.layout import NOISE_FILE
from dray.spec import Spec

LOOKED_AT = 2**17
"""Positions before the last one among which every source is met."""


class Span(TypedDict):
    """Steps under one noise."""

    last_step: int
    uses: int
    """Of the row that is used most often in them."""
    noise_multiplier: float


def most_uses(spec: Spec, manifest: Manifest, num_steps: int, first_step: int = 0) -> int:
    """How often the row that is used most often is used in the steps from the first one on, of so
    many in all; at most once too many where they begin within an epoch. Batches that were left out
    count as used."""
    order = make_order(manifest, spec.seed)
    begun = _begun(order, first_step * spec.batch.global_rows)
    return max(
        (
            epochs - max(0, begun.get(pool, 0) - 1)
            for pool, epochs in _begun(order, num_steps * spec.batch.global_rows).items()
        ),
        default=0,
    )


def _begun(order: Order, end: int) -> dict[int, int]:
    """The epochs that have begun before a position, by pool."""
    found: dict[int, int] = {}
    while end > 0 and len(found) < len(order.pools):
        begin = max(0, end - LOOKED_AT)
        pools, epochs = order.epochs_at(np.arange(begin, end, dtype=np.int64))
        for pool in np.unique(pools):
            count = int(epochs[pools == pool].max()) + 1
            found[int(pool)] = max(found.get(int(pool), 0), count)
        end = begin
    return found


def check_privacy(
    spec: Spec, manifest: Manifest, num_steps: int, run: Run | None, origin: Run | None
) -> None:
    """Before anything of a run is written, or it goes on for so many steps in all: raise SpecError
    where its ε would not be what its spec says, and StoreError for a run that has lost its noise.
    `origin`: what a new fork starts from."""
    given = spec.privacy
    if given is None:
        return
    num_rows = manifest.train.num_rows
    if run is None and given.delta * num_rows >= 1:
        raise SpecError(
            f"privacy.delta = {given.delta:g}",
            f"of {num_rows:,} rows one may be given away whole by chance",
            "δ is less than one in the number of rows",
            f"give privacy.delta={0.1 / num_rows:.0e}",
        )
    kept = None if run is None else _noise_of(run)
    if kept is None:
        info = None if origin is None else origin.latest_checkpoint()
        spent = [] if origin is None or info is None else _spent_by(origin, info.step, spec)
        _multiplier(spec, manifest, num_steps, spent)
    elif given.epsilon is not None:
        reached = _epsilon(given.delta, _spans(spec, manifest, num_steps, kept))
        if reached > given.epsilon * (1 + 1e-6):
            raise SpecError(
                f"privacy.epsilon = {given.epsilon:g}",
                f"ε would be {reached:.4g} after {num_steps} steps",
                "a run keeps the noise that it began with",
                "keep the duration it began with, or --fork NEW_NAME with a greater "
                "privacy.epsilon: what is spent by then is counted",
            )


def keep_noise(run: Run, spec: Spec, manifest: Manifest, num_steps: int) -> None:
    """Decide over the noise of a run that has begun, and keep that; what it keeps already stays.
    Raises StoreError for a run that has lost its noise."""
    given = spec.privacy
    if given is None or _noise_of(run) is not None:
        return
    spent = _spent_by_origin(run, spec)
    key = secrets.token_hex(32)
    if given.noise_seed is not None:
        key = f"{given.noise_seed:064x}"[-64:]
    kept = {"key": key, "noise_multiplier": _multiplier(spec, manifest, num_steps, spent)}
    run.keep_noise(kept | {"spent": spent})


def privacy_of(run: Run, step: int | None = None) -> dict[str, Any] | None:
    """What a run's weights have spent by a step, or by its newest sound checkpoint: `epsilon`
    (None: infinite), `delta`, `uses` of a row, `noise_multiplier`, `max_grad_norm`, and whether the
    noise is `public`. None for a run without privacy. Raises StoreError for one that has lost its
    noise."""
    spec = run.spec()
    if spec.privacy is None:
        return None
    kept = _noise_of(run)
    if kept is None:
        raise _lost(run)
    manifest = load_run_manifest(run)
    if step is None:
        info = run.latest_checkpoint()
        step = info.step if info else 0
    spans = _spans(spec, manifest, step, kept)
    epsilon = _epsilon(spec.privacy.delta, spans)
    return {
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "delta": spec.privacy.delta,
        "uses": sum(one["uses"] for one in spans),
        "noise_multiplier": float(kept["noise_multiplier"]),
        "max_grad_norm": spec.privacy.max_grad_norm,
        "public": spec.privacy.noise_seed is not None,
    }


def describe_privacy(told: Mapping[str, Any]) -> str:
    """What a private run proves, in a line."""
    if told["public"]:
        return "none: its noise follows from privacy.noise_seed, which is no secret"
    epsilon = "no ε that says anything" if told["epsilon"] is None else f"ε = {told['epsilon']:.4g}"
    return (
        f"{epsilon} at δ = {told['delta']:g}; uses of a row {told['uses']}, noise "
        f"{told['noise_multiplier']:.4g}, gradients up to {told['max_grad_norm']:g}"
    )


def told_privacy(run: Run) -> str | None:
    """The same of a run, or why nothing can be told; None for one without privacy."""
    try:
        told = privacy_of(run)
    except UserError as error:
        return f"cannot be told: {error}"
    return None if told is None else describe_privacy(told)


def _noise_of(run: Run) -> dict[str, Any] | None:
    """What it keeps; None for a run that has drawn none yet. Raises StoreError for one that has
    lost it: other noise would count as if it had been there from the first step on."""
    kept = run.noise()
    if kept is None and run.attempts():
        raise _lost(run)
    if kept is not None and "spent" not in kept:  # of a fork that did not count it yet
        kept = {**kept, "spent": _spent_by_origin(run, run.spec())}
    return kept


def _lost(run: Run) -> StoreError:
    return StoreError(
        f"run {run.name!r}",
        f"has lost its noise ({NOISE_FILE})",
        "a private run keeps it: what its weights say of a row follows from it",
        "put the file back, or begin another run",
    )


def _spent_by_origin(run: Run, spec: Spec) -> list[Span]:
    """What was spent before a run began, which is nothing unless it is a fork."""
    fork = run.origin()
    if fork is None:
        return []
    return _spent_by(Run.open(run.storage, fork["run"]), int(fork["step"]), spec)


def _spent_by(origin: Run, step: int, fork: Spec) -> list[Span]:
    """What the steps of a fork's origin have spent, up to the one that the fork starts from. Raises
    SpecError where they had no noise, or such as is no secret."""
    if not step:
        return []
    spec = origin.spec()
    is_public = spec.privacy is not None and spec.privacy.noise_seed is not None
    if spec.privacy is None or (is_public and fork.privacy and fork.privacy.noise_seed is None):
        raise SpecError(
            "privacy",
            f"the {step} steps of {origin.name} that the fork goes on from had "
            f"{'noise that is no secret' if is_public else 'no noise'}",
            "weights that were trained so hide no row",
            "train a new run with privacy, or fork without it",
        )
    kept = _noise_of(origin)
    if kept is None:
        raise _lost(origin)
    return _spans(spec, load_run_manifest(origin), step, kept)


def _spans(spec: Spec, manifest: Manifest, num_steps: int, kept: Mapping[str, Any]) -> list[Span]:
    """How often a row was used under which noise, of all spans of steps under one noise."""
    before: list[Span] = [*kept.get("spent", ())]
    first = before[-1]["last_step"] if before else 0
    own = Span(
        last_step=num_steps,
        uses=most_uses(spec, manifest, num_steps, first),
        noise_multiplier=float(kept["noise_multiplier"]),
    )
    return [*before, own] if num_steps > first else before


def _epsilon(delta: float, spans: Sequence[Span]) -> float:
    """ε of all spans together."""
    return epsilon_of(delta, math.sqrt(_squared(spans)))


def _squared(spans: Sequence[Span]) -> float:
    """μ² of uses under different noise: what is released of a row adds up by squares (Dong, Roth
    and Su 2022, corollary 3.3)."""
    return sum(mu_of(one["uses"], one["noise_multiplier"]) ** 2 for one in spans)


def _multiplier(spec: Spec, manifest: Manifest, num_steps: int, spent: Sequence[Span]) -> float:
    """The noise of steps to come. Raises SpecError where an ε is spent before they begin."""
    given = spec.privacy
    assert given is not None
    if given.noise_multiplier is not None:
        return given.noise_multiplier
    assert given.epsilon is not None
    first = spent[-1]["last_step"] if spent else 0
    uses = max(1, most_uses(spec, manifest, num_steps, first))
    left = mu_for(given.epsilon, given.delta) ** 2 - _squared(spent)
    if left <= 0:
        raise SpecError(
            f"privacy.epsilon = {given.epsilon:g}",
            f"ε is {_epsilon(given.delta, spent):.4g} after the {first} "
            "steps that the fork goes on from",
            "what is spent stays spent",
            "give a greater privacy.epsilon",
        )
    return noise_for(uses, math.sqrt(left))
