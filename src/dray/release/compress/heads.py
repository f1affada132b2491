"""Fewer attention heads, the same number in each block. Heads that share keys and values stay or go
together, so grouped-query models keep their groups.

An architecture whose configuration derives a head's size from the number of heads (BERT) cannot
have fewer of the same size, and is refused.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field as Limits
from torch import Tensor, nn

from dray.release.compress.calibrating import Judging, watch
from dray.release.compress.method import Candidate, Method
from dray.release.compress.shrinking import best, find_stack, keep_places, rebuild, state_of
from dray.spec.sections import Int

_INTO, _OUT = ("q_proj", "k_proj", "v_proj"), "o_proj"


class Heads(Method):
    """Fewer heads of the same size."""

    name = "heads"

    class Settings(Judging):
        """How many."""

        keep: Annotated[Int, Limits(ge=1)]
        """Heads of each block that are left: a multiple of those that share keys and values."""

    def check(self, candidate: Candidate) -> None:
        self._sizes(candidate)
        self._attentions(candidate)

    def _sizes(self, candidate: Candidate) -> tuple[int, int, int]:
        """(groups that are left, heads a group, size of a head). Raises SpecError."""
        config = candidate.model.config
        num, size = config.num_attention_heads, getattr(config, "head_dim", None)
        if size is None:
            raise self.refused(
                candidate,
                "its configuration makes a head's size of the number of heads",
                "fewer heads of the same size need a head_dim of their own",
                "use width or layers",
            )
        groups = getattr(config, "num_key_value_heads", None) or num
        a_group = num // groups
        keep = self.settings.keep
        if keep >= num or keep % a_group:
            raise self.refused(
                candidate,
                f"has {num} heads, {a_group} to each of {groups} keys and values",
                f"keep = {keep} is to be less, and a multiple of {a_group}",
            )
        return keep // a_group, a_group, size

    def _attentions(self, candidate: Candidate) -> list[tuple[str, nn.Module]]:
        """The attention of each block, with its name."""
        found = []
        for name, block in find_stack(candidate, self):
            inner = [
                (f"{name}.{place}", module)
                for place, module in block.named_modules()
                if all(isinstance(getattr(module, p, None), nn.Linear) for p in (*_INTO, _OUT))
            ]
            if len(inner) != 1:
                raise self.refused(
                    candidate,
                    f"{name} has {len(inner)} attentions with {', '.join((*_INTO, _OUT))}",
                    "queries, keys and values are matrices of their own",
                    "use width or layers",
                )
            found += inner
        return found

    def apply(self, candidate: Candidate) -> None:
        groups, a_group, size = self._sizes(candidate)
        attentions = self._attentions(candidate)
        outs = {name: getattr(module, _OUT) for name, module in attentions}
        scores = self._scores(candidate, outs, a_group * size)
        weights = state_of(candidate.model)
        for name, _ in attentions:
            kept = best(scores[name], groups)
            wide, narrow = _spread(kept, a_group * size), _spread(kept, size)
            keep_places(weights, f"{name}.q_proj", 0, wide)
            keep_places(weights, f"{name}.k_proj", 0, narrow)
            keep_places(weights, f"{name}.v_proj", 0, narrow)
            keep_places(weights, f"{name}.{_OUT}", 1, wide)
        changes = {"num_attention_heads": groups * a_group, "head_dim": size}
        if getattr(candidate.model.config, "num_key_value_heads", None) is not None:
            changes["num_key_value_heads"] = groups
        candidate.say(f"heads: {groups * a_group} of each block stay")
        candidate.model = rebuild(candidate, self, changes, weights)
        self.recover(candidate)

    def _scores(
        self, candidate: Candidate, outs: dict[str, nn.Module], width: int
    ) -> dict[str, Tensor]:
        """How much each group of heads matters, [groups]."""
        if self.settings.by == "weights":
            return {
                name: module.weight.detach().square().sum(dim=0).reshape(-1, width).sum(dim=1)  # type: ignore[operator]
                for name, module in outs.items()
            }
        gradients = self.settings.by == "gradients"

        def score(module: nn.Module, value: Tensor, gradient: Tensor | None) -> Tensor:
            """Σ over tokens of |Σ over a head's places of activation · gradient| (Michel et al.,
            2019), or of what the head gives on."""
            flat = value.reshape(-1, value.shape[-1] // width, width)
            found: Tensor
            if gradient is not None:
                found = (flat * gradient.reshape(flat.shape)).sum(dim=-1).abs().sum(dim=0)
                return found
            weight: Any = module.weight
            parts = weight.detach().reshape(len(weight), -1, width)
            found = torch.einsum("tgi,ogi->tgo", flat, parts).norm(dim=-1).sum(dim=0)
            return found

        return watch(candidate, outs, score, num_rows=self.settings.rows, gradients=gradients)


def _spread(groups: Tensor, width: int) -> Tensor:
    """The places of groups of so many places each."""
    return (groups[:, None] * width + torch.arange(width)).flatten()
