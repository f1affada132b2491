"""What a private run's ε is: from its noise, which the run keeps, and from how often its order has
used a row.

The noise is a secret of the run: it follows from a key in the run's folder, beside the rows, which
are no less secret. No export has it. A run without privacy has none of this.
"""

from __future__ import annotations

import math
import secrets
from typing import Any

import numpy as np

from dray.corpus.manifest import Manifest, load_run_manifest
from dray.corpus.stream import make_order
from dray.errors import StoreError
from dray.plan.privacy import epsilon_of, mu_of, noise_for
from dray.runs import Run
from dray.spec import Spec

LOOKED_AT = 2**17
"""Positions before the last one among which every source is met."""


def most_uses(spec: Spec, manifest: Manifest, num_steps: int) -> int:
    """How often the row that is used most often has been used after so many steps. Batches that
    were left out count as used."""
    last = num_steps * spec.batch.global_rows
    if not last:
        return 0
    order = make_order(manifest, spec.seed)
    found = 0
    seen: set[int] = set()
    end = last
    while end > 0 and len(seen) < len(order.pools):
        begin = max(0, end - LOOKED_AT)
        pools, epochs = order.epochs_at(np.arange(begin, end, dtype=np.int64))
        found = max(found, int(epochs.max()) + 1)
        seen |= {int(pool) for pool in np.unique(pools)}
        end = begin
    return found


def keep_noise(run: Run, spec: Spec, manifest: Manifest, num_steps: int) -> None:
    """Decide over the noise of a run that has begun, and keep that; what it keeps already stays.
    Raises StoreError."""
    given = spec.privacy
    if given is None or run.noise() is not None:
        return
    multiplier = given.noise_multiplier
    if given.epsilon is not None:
        uses = most_uses(spec, manifest, num_steps)
        multiplier = noise_for(given.epsilon, given.delta, max(1, uses))
    key = secrets.token_hex(32)
    if given.noise_seed is not None:
        key = f"{given.noise_seed:064x}"[-64:]
    run.keep_noise({"key": key, "noise_multiplier": multiplier})


def privacy_of(run: Run) -> dict[str, Any] | None:
    """What a run's weights have spent by its newest sound checkpoint: `epsilon` (None: infinite),
    `delta`, `uses` of a row, `noise_multiplier`, `max_grad_norm`, and whether the noise is
    `public`. None for a run without privacy. Raises StoreError for one that has lost its noise."""
    spec = run.spec()
    if spec.privacy is None:
        return None
    kept = run.noise()
    if kept is None:
        raise StoreError(f"run {run.name!r}", "has lost its noise", "a private run keeps it")
    info = run.latest_checkpoint()
    uses = most_uses(spec, load_run_manifest(run), info.step if info else 0)
    noise = float(kept["noise_multiplier"])
    epsilon = epsilon_of(spec.privacy.delta, mu_of(uses, noise)) if uses else 0.0
    return {
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "delta": spec.privacy.delta,
        "uses": uses,
        "noise_multiplier": noise,
        "max_grad_norm": spec.privacy.max_grad_norm,
        "public": spec.privacy.noise_seed is not None,
    }
