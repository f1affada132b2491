"""Whole blocks taken out: the model has fewer layers, and is faster by as many. Which ones matter
is judged by what they do to the stream that goes through.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field as Limits
from torch import Tensor, nn

from dray.errors import SpecError
from dray.release.compress.calibrating import Judging, watch
from dray.release.compress.method import Candidate, Method
from dray.release.compress.shrinking import find_stack, rebuild, state_of, subset
from dray.spec import Spec
from dray.spec.sections import Int


class Layers(Method):
    """Fewer blocks."""

    name = "layers"

    class Settings(Judging):
        """How many, and which."""

        keep: Annotated[Int, Limits(ge=1)]
        """Blocks that are left."""
        by: Literal["spaced", "gradients", "activations", "weights"] = "activations"  # type: ignore[assignment]
        """`activations`: those stay that turn the stream most (1 less the cosine of what goes in
        and what comes out: block influence); `gradients`: those whose leaving would change the loss
        most, to first order; `weights`: those with the largest matrices; `spaced`: evenly from the
        first to the last."""

    def suits(self, spec: Spec) -> None:
        num = spec.model.num_layers
        if num is not None and self.settings.keep >= num:
            raise SpecError(
                f"--with {self.name}",
                f"the model has {num} blocks",
                f"keep = {self.settings.keep} takes none out",
                f"give {num - 1} or fewer",
            )

    def check(self, candidate: Candidate) -> None:
        num = len(find_stack(candidate, self))
        if self.settings.keep >= num:
            raise self.refused(
                candidate,
                f"has {num} blocks",
                f"keep = {self.settings.keep} takes none out",
                f"give {num - 1} or fewer",
            )

    def apply(self, candidate: Candidate) -> None:
        self.check(candidate)
        blocks = find_stack(candidate, self)
        kept = self._choose(candidate, dict(blocks))
        candidate.say(f"layers: blocks {', '.join(map(str, kept))} of {len(blocks)} stay")
        stem = blocks[0][0].rpartition(".")[0]
        new = {old: place for place, old in enumerate(kept)}
        weights: dict[str, Tensor] = {}
        for name, tensor in state_of(candidate.model).items():
            rest = name.removeprefix(f"{stem}.")
            if rest == name:
                weights[name] = tensor
                continue
            number, _, leaf = rest.partition(".")
            if int(number) in new:
                weights[f"{stem}.{new[int(number)]}.{leaf}"] = tensor
        config = candidate.model.config.to_dict()
        lists = {
            name: subset(values, kept, len(blocks))
            for name, values in config.items()
            if name.startswith("layer") or name.endswith("layers")
        }
        changes = {name: values for name, values in lists.items() if values is not config[name]}
        changes["num_hidden_layers"] = len(kept)
        candidate.model = rebuild(candidate, self, changes, weights)
        self.recover(candidate)

    def _choose(self, candidate: Candidate, blocks: dict[str, nn.Module]) -> list[int]:
        keep, by = self.settings.keep, self.settings.by
        if by == "spaced":
            return sorted(
                {round(place) for place in torch.linspace(0, len(blocks) - 1, keep).tolist()}
            )
        if by == "weights":
            scores = [
                sum(float(p.detach().square().sum()) for p in block.parameters())
                for block in blocks.values()
            ]
        else:
            gradients = by == "gradients"
            found = watch(
                candidate,
                blocks,
                _change_of_loss if gradients else _turn,
                num_rows=self.settings.rows,
                gradients=gradients,
                outputs=True,
            )
            scores = [float(found[name]) for name in blocks]
        return sorted(torch.tensor(scores).topk(keep).indices.tolist())


def _turn(module: nn.Module, both: Tensor, gradient: Tensor | None) -> Tensor:
    """1 - cosine of what goes in and what comes out, over tokens (Men et al., 2024: ShortGPT)."""
    return (1 - torch.cosine_similarity(both[0], both[1], dim=-1)).sum()


def _change_of_loss(module: nn.Module, both: Tensor, gradient: Tensor | None) -> Tensor:
    """|Σ (out - in) · gradient| of each row: the loss without the block, to first order (Molchanov
    et al., 2019)."""
    assert gradient is not None
    return ((both[1] - both[0]) * gradient).flatten(1).sum(dim=1).abs().sum()
