"""Where attention flows: rollout (Abnar and Zuidema, 2020), the product of the blocks' mean
attentions, each half of which passes a token on as it is. It says what could have been mixed into
the place that a model predicts by, not what it made of it. Refuses models without attentions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dray.errors import SpecError
from dray.tasks.task import Batch


@torch.no_grad()
def roll_out(model: Any, inputs: Batch, where: str) -> npt.NDArray[np.float64]:
    """How much of each token is in the place that the model predicts by, [tokens], adding up to 1.

    `inputs`: of one row, without padding. Encoders predict by their first token, or by the mean of
    all (`classifier_pooling`), decoders by their last one. Raises SpecError.
    """
    before = getattr(model.config, "_attn_implementation", "eager")
    model.set_attn_implementation("eager")  # others give no probabilities
    try:
        found = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    if not found or any(one is None for one in found):
        raise SpecError(
            where,
            f"its architecture ({model.config.model_type}) gives no attentions",
            "rollout follows them through the blocks",
            "give --method gradients",
        )
    whole = None
    for block in found:
        mean = block[0].double().mean(dim=0)
        step = (mean + torch.eye(len(mean), dtype=mean.dtype, device=mean.device)) / 2
        step = step / step.sum(dim=-1, keepdim=True)
        whole = step if whole is None else step @ whole
    assert whole is not None
    looks_back = bool(found[0].shape[-1] > 1 and float(found[0][..., 0, 1:].abs().max()) == 0)
    if getattr(model.config, "classifier_pooling", "") == "mean":
        shares = whole.mean(dim=0)
    else:
        shares = whole[-1 if looks_back else 0]
    rolled: npt.NDArray[np.float64] = shares.cpu().numpy()
    return rolled
