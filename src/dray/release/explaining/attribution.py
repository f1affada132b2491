"""Which tokens, or which patches of an image, a model's output hangs on.

Tokens by integrated gradients (Sundararajan et al., 2017) over their embeddings: what is told of
all tokens adds up to the output's distance from that of the same text with every token hidden, and
how far it does is told. Patches by occlusion (Zeiler and Fergus, 2014): how much the output falls
when one is covered. captum computes both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dray.tasks.task import Batch

FEWEST_STEPS, MOST_STEPS = 50, 800
COMPLETE = 0.01
"""Share of the distance that attributions may miss before more steps are taken."""
STEPS_AT_ONCE = 16
PATCHES = 8
"""On each side of an image."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Attribution:
    """What one output hangs on. `values`: of each token [tokens], or of each patch [rows,
    columns]."""

    values: Floats
    output: float
    baseline: float
    """The output for what hides everything."""
    error: float | None = None
    """By how much the values miss the distance between both; None where they need not add up."""
    steps: int = 0

    def told(self) -> dict[str, Any]:
        """As JSON has it."""
        found = {"output": self.output, "baseline": self.baseline}
        if self.error is None:
            return found
        return {**found, "completeness_error": self.error, "steps": self.steps}


def attribute_tokens(
    model: Any, inputs: Batch, place: int, *, hidden: int, spared: Tensor
) -> Attribution:
    """Of one row's logit at `place`. `inputs`: what the model takes, [1, tokens] without padding.
    `hidden`: the id that stands for no token; `spared` [tokens]: those that stay in the baseline,
    such as what stands around a text."""
    from captum.attr import IntegratedGradients

    embed = model.get_input_embeddings()
    ids = inputs["input_ids"]
    with torch.no_grad():
        given = embed(ids)
        nothing = embed(torch.where(spared, ids, torch.full_like(ids, hidden)))
    others = {name: values for name, values in inputs.items() if name != "input_ids"}

    def output(embedded: Tensor) -> Tensor:
        along = {
            name: values.expand(len(embedded), *values.shape[1:]) for name, values in others.items()
        }
        logits: Tensor = model(inputs_embeds=embedded, **along).logits
        return logits[:, place].float()

    with torch.no_grad():
        values = float(output(given)), float(output(nothing))
    gradients = IntegratedGradients(output)
    steps = FEWEST_STEPS
    while True:
        found = gradients.attribute(
            given, nothing, n_steps=steps, internal_batch_size=STEPS_AT_ONCE, method="gausslegendre"
        )
        tokens = found.detach().double().sum(dim=-1)[0].cpu().numpy()
        error = float(tokens.sum() - (values[0] - values[1]))
        if abs(error) <= COMPLETE * max(abs(values[0] - values[1]), 1e-3) or steps >= MOST_STEPS:
            return Attribution(tokens, *values, error, steps)
        steps *= 2


def attribute_patches(output: Callable[[Tensor], Tensor], image: Tensor) -> Attribution:
    """Of one image's output, which is given images [images, channels, height, width] and gives
    [images]. `image` [1, channels, height, width]. A patch is covered by 0, which is the mean
    pixel."""
    from captum.attr import Occlusion

    channels, height, width = image.shape[1:]
    size = max(1, height // PATCHES), max(1, width // PATCHES)
    with torch.no_grad():
        found = Occlusion(output).attribute(
            image,
            sliding_window_shapes=(channels, *size),
            strides=(channels, *size),
            baselines=0.0,
            perturbations_per_eval=STEPS_AT_ONCE,
        )
        values = float(output(image)), float(output(torch.zeros_like(image)))
    pixels = found[0].double().mean(dim=0).cpu().numpy()
    return Attribution(pixels[:: size[0], :: size[1]], *values)
