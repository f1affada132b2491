"""A dictionary behind a block of a model, and what it costs to say hidden states by it.

A hidden state h [width] is made comparable first (Gao et al., 2024, appendix A): its mean over the
width is taken off, and what is left divided by its norm: x = (h - mean h) / ‖h - mean h‖. So all
tokens weigh alike, those with huge norms too, and a learning rate suits any model. Features are
f = top_k or all of ReLU(E (x - b) + a), and say x̂ = Σ f_i d_i / ‖d_i‖ + b: directions have unit
norm, made in every pass, so that there is no state to it. A token's loss is ‖x - x̂‖², plus l1 Σ f,
or plus the auxiliary weight times ‖(x - x̂) - ê‖², where ê is made of silent features alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dray.errors import SpecError
from dray.models.cutting import leave_blocks
from dray.models.groups import find_blocks
from dray.tasks.parts.graphs import takes_segments
from dray.tasks.parts.objectives import model_inputs

if TYPE_CHECKING:
    from dray.tasks.task import Batch, Output, Terms

EPSILON = 1e-6
"""Of norms: a state of zeros stays one."""


def add_dictionary(model: Any, settings: Any) -> None:
    """Leave a model nothing behind the block that `settings` name, and put a dictionary beside it,
    as its `dictionary`. Draws from torch's generator. Raises SpecError for a model without such a
    block."""
    blocks = find_blocks(model)
    where = f"task.block = {settings.block}"
    if getattr(model.config, "is_encoder_decoder", False) or not blocks:
        what = "reads and writes apart" if blocks else "has no blocks that transformers knows"
        raise SpecError(where, f"{type(model).__name__} {what}", "a block is one of a row of them")
    if settings.block >= len(blocks):
        raise SpecError(
            where,
            f"the model has {len(blocks)} blocks",
            "they are counted from 0",
            f"give {len(blocks) - 1} or less",
        )
    leave_blocks(model, settings.block + 1, where)
    width = int(model.config.get_text_config().hidden_size)
    like = next(model.parameters())
    model.dictionary = Dictionary(width, settings, device=like.device, dtype=like.dtype)


class Dictionary(nn.Module):
    """Encoder and decoder. It begins with unit directions at random, which the encoder looks
    along."""

    def __init__(
        self, width: int, settings: Any, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        shape = (settings.features, width)
        on_meta = device.type == "meta"
        drawn = torch.empty(shape, device="meta") if on_meta else torch.randn(shape)
        drawn = F.normalize(drawn, dim=1).to(device, dtype)
        self.encoder_weight = nn.Parameter(drawn.clone())
        self.encoder_bias = nn.Parameter(torch.zeros(shape[0], device=device, dtype=dtype))
        self.decoder_weight = nn.Parameter(drawn)
        self.decoder_bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))
        self.num_features, self.top_k = settings.features, settings.top_k
        self.auxiliary_top_k = min(settings.auxiliary_top_k, settings.features)

    def forward(
        self, states: Tensor, silent: Tensor | None = None, *, dense: bool = False
    ) -> dict[str, Tensor]:
        """Of states [tokens, width]: `found`, what is said of them, fp32; `sums` of each token's
        features [tokens], fp32; `chosen` and `values`, which features and how strongly
        [tokens, top_k], or all of them as `activations` [tokens, features], which `dense` asks for
        in any case; and what the `silent` ones [features] say of the rest, as `rest`."""
        states = states.to(self.decoder_weight.dtype)
        directions = F.normalize(self.decoder_weight, dim=1, eps=EPSILON)
        before = F.linear(states - self.decoder_bias, self.encoder_weight, self.encoder_bias)
        told: dict[str, Tensor] = {}
        if self.top_k is None:
            told["activations"] = values = F.relu(before)
            found = values @ directions
        else:
            values, chosen = before.topk(self.top_k, dim=1)
            values = F.relu(values)
            told["chosen"], told["values"] = chosen, values
            found = _said(chosen, values, directions)
            if dense:
                told["activations"] = torch.zeros_like(before).scatter(1, chosen, values)
        told["found"] = (found + self.decoder_bias).float()
        told["sums"] = values.float().sum(dim=1)
        if silent is not None:
            masked = before.masked_fill(~silent, float("-inf"))
            values, chosen = masked.topk(self.auxiliary_top_k, dim=1)
            told["rest"] = _said(chosen, F.relu(values), directions).float()
        return told


def _said(chosen: Tensor, values: Tensor, directions: Tensor) -> Tensor:
    """Σ values · directions[chosen] of each token, [tokens, width]; as a sparse product, whose work
    goes by the chosen ones."""
    return F.embedding_bag(chosen, directions, per_sample_weights=values, mode="sum")


class DictionaryLoss(nn.Module):
    """A model that stays as it is, in evaluation mode throughout, and the summed loss of its
    dictionary over the tokens that are learnt from.

    `counts`: without gradients, `fired` tells on which share of tokens each feature fires, by which
    silent ones are known. `dense`: it gives every token's features, too.
    """

    def __init__(self, model: Any, settings: Any, *, counts: bool, dense: bool) -> None:
        super().__init__()
        self.model = model
        self.l1, self.auxiliary = settings.l1 or 0.0, settings.auxiliary
        self.counts, self.dense = counts, dense
        self.takes_segments = takes_segments(model)
        self._seen: list[Tensor] = []
        find_blocks(model)[-1].register_forward_hook(self._see)

    def _see(self, block: nn.Module, given: Any, output: Any) -> None:
        self._seen[:] = [output[0] if isinstance(output, tuple) else output]

    def train(self, mode: bool = True) -> Self:
        """The model's own dropout is none of the dictionary's."""
        super().train(mode)
        self.model.train(False)
        return self

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """The states at `places` as a dictionary takes them, [places, width], fp32."""
        self.model(**model_inputs(batch, self.takes_segments))
        hidden = self._seen.pop().flatten(0, 1)
        return comparable(hidden[batch["places"].clamp(min=0)].float())

    def features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Features of every token of a text, special ones too, [rows, tokens, features]."""
        masks = {} if attention_mask is None else {"attention_mask": attention_mask}
        self.model(input_ids=input_ids, **masks)
        states = comparable(self._seen.pop().float())
        told = self.model.dictionary(states.flatten(0, 1), dense=True)
        features: Tensor = told["activations"].unflatten(0, input_ids.shape)
        return features

    def forward(self, batch: Batch) -> tuple[Terms, Output]:
        states = batch["states"] if "states" in batch else self.states(batch)
        real = (batch["places"] >= 0).float()
        silent = batch.get("silent")
        told = self.model.dictionary(states, silent, dense=self.dense)
        left = states - told["found"]
        errors = left.square().sum(dim=1)
        losses = errors + self.l1 * told["sums"]
        if silent is not None:
            rest = (left.detach() - told["rest"]).square().sum(dim=1)
            losses = losses + self.auxiliary * rest * silent.any()
        loss, count = (losses * real).sum(), real.sum()
        terms: Terms = {"loss": (loss, count)}
        if torch.is_grad_enabled():
            return terms, {}
        num_fired, num_active = _fired(told, real, self.model.dictionary.num_features)
        if self.counts:
            terms["fired"] = (num_fired, count.expand_as(num_fired))
        output = {"states": states, "losses": losses, "errors": errors, "num_fired": num_fired}
        output |= {"num_active": num_active}
        return terms, output | ({"activations": told["activations"]} if self.dense else {})


def comparable(hidden: Tensor) -> Tensor:
    """Hidden states [..., width] without their mean, of unit norm."""
    return F.normalize(hidden - hidden.mean(dim=-1, keepdim=True), dim=-1, eps=EPSILON)


def _fired(told: dict[str, Tensor], real: Tensor, num_features: int) -> tuple[Tensor, Tensor]:
    """On how many tokens each feature fires, [features], and how many fire on each, [tokens]."""
    if "chosen" not in told:
        fires = (told["activations"] > 0) * real[:, None]
        return fires.sum(dim=0), fires.sum(dim=1)
    fires = (told["values"] > 0) * real[:, None]
    counts = torch.zeros(num_features, device=real.device)
    counts.scatter_add_(0, told["chosen"].flatten(), fires.flatten())
    return counts, fires.sum(dim=1)
