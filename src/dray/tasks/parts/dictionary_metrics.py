"""How well a dictionary says hidden states, and by how many of its features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    from dray.tasks.task import Batch, Output


class DictionaryMetrics:
    """Sums over tokens, in fp64."""

    names = ("loss", "explained", "l0", "dead_share")

    def __init__(self, num_features: int) -> None:
        self._fired = np.zeros(num_features, np.int64)
        self._num_tokens = 0
        self._sums = np.zeros(4)  # of losses, errors, squares, active features
        self._states = np.zeros(1)

    def update(self, batch: Batch, output: Output) -> None:
        real = batch["places"] >= 0
        states = output["states"][real].double()
        sums = [
            output["losses"][real].double().sum(),
            output["errors"][real].double().sum(),
            states.square().sum(),
            output["num_active"][real].double().sum(),
        ]
        self._sums += np.array([float(value) for value in sums])
        self._states = self._states + states.sum(dim=0).cpu().numpy()
        self._fired += output["num_fired"].cpu().numpy().astype(np.int64)
        self._num_tokens += int(real.sum())

    def state(self) -> dict[str, Any]:
        return {
            "fired": self._fired,
            "num_tokens": self._num_tokens,
            "sums": self._sums,
            "states": self._states,
        }

    def merge(self, states: Iterable[dict[str, Any]]) -> Self:
        for state in states:
            self._fired = self._fired + state["fired"]
            self._num_tokens += state["num_tokens"]
            self._sums = self._sums + state["sums"]
            self._states = self._states + state["states"]
        return self

    def compute(self) -> dict[str, float]:
        """`loss` of a token; `explained`, the share of the variance of states over tokens; `l0`,
        how many features fire on a token; `dead_share`, which share of them fires on none;
        `num_targets`."""
        if not self._num_tokens:
            return dict.fromkeys((*self.names, "num_targets"), 0.0)
        loss, errors, squares, active = self._sums.tolist()
        variance = squares - float(np.square(self._states).sum()) / self._num_tokens
        return {
            "loss": loss / self._num_tokens,
            "explained": 1.0 - errors / variance if variance > 0 else 0.0,
            "l0": active / self._num_tokens,
            "dead_share": float((self._fired == 0).mean()),
            "num_targets": float(self._num_tokens),
        }

    def undefined(self) -> tuple[str, ...]:
        if not self._num_tokens:
            return self.names
        return () if self._num_tokens > 1 else ("explained",)
