"""The optimisers of `dray.spec` as torch optimisers that can be told to leave everything as it is.

DeepSpeed's wrappers call `step` once a group of parameters. What an optimiser keeps is made by the
engine, by the spec's declaration, unless one of those wrappers takes a step before. The learning
rate is set at each step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dray.spec import Optimizer

Groups = list[dict[str, Any]]


class _Guarded:
    """An optimiser whose update may be withheld. The answer stays on the device: nothing waits for
    it."""

    param_groups: Groups
    withheld: Callable[[], Tensor] | None = None
    """1.0 to leave everything as it is, else 0.0: fp32 without dimensions."""

    def counts(self, *, is_hidden: bool) -> bool:
        """Whether it counts its steps, as `step` in the state of a parameter."""
        return True

    def _withheld(self) -> Tensor | None:
        """The answer where the parameters lie: with offload on the host."""
        devices = [p.device for group in self.param_groups for p in group["params"][:1]]
        if self.withheld is None or not devices:
            return None
        return self.withheld().to(devices[0])


class _Fused(_Guarded):
    """torch's fused kernels take the answer as they take a gradient scaler's `found_inf`, and then
    change neither weights nor states nor the count of steps."""

    def step(self, closure: Any = None) -> Any:
        """The update, where it is not withheld."""
        self.found_inf = self._withheld()
        return super().step(closure)  # type: ignore[misc]


class GuardedAdamW(_Fused, torch.optim.AdamW):
    """torch's AdamW."""


class GuardedSgd(_Fused, torch.optim.SGD):
    """torch's SGD."""

    def counts(self, *, is_hidden: bool) -> bool:
        """It does not."""
        return False


class GuardedAdamW8bit(_Guarded, torch.optim.Optimizer):
    """bitsandbytes' update of moments in 8 bits by blocks (Dettmers et al. 2022, arXiv 2110.02861)
    where those are kept, torch's AdamW elsewhere. It waits for the device twice a step."""

    def __init__(self, groups: Groups, adamw: Mapping[str, Any]) -> None:
        super().__init__(groups, dict(adamw))
        self._adamw = GuardedAdamW(groups, **adamw)
        self._adamw.state = self.state
        self._maps: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """The update, where it is not withheld."""
        withheld = self._withheld()
        if withheld is not None and bool(withheld):
            return
        gradients: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            quantized = [
                p
                for p in group["params"]
                if p.grad is not None and "exp_avg_scale" in self.state[p]
            ]
            if quantized:
                self._step_quantized(quantized, group)
            gradients.update((p, p.grad) for p in quantized)
        for weights in gradients:  # the groups are AdamW's too, which passes over these
            weights.grad = None
        self._adamw.step()
        for weights, gradient in gradients.items():
            weights.grad = gradient

    def _step_quantized(self, parameters: list[Any], group: Mapping[str, Any]) -> None:
        functional = _bitsandbytes()
        signed, unsigned = self._code_maps(parameters[0].device)
        steps = [self.state[weights]["step"] for weights in parameters]
        torch._foreach_add_(steps, 1.0)
        beta1, beta2 = group["betas"]
        for weights, num_steps in zip(parameters, torch.stack(steps).tolist(), strict=True):
            state = self.state[weights]
            functional.optimizer_update_8bit_blockwise(
                "adam",
                weights.grad,
                weights,
                state["exp_avg"],
                state["exp_avg_sq"],
                beta1,
                beta2,
                0.0,  # beta3 and alpha are another optimiser's
                0.0,
                group["eps"],
                int(num_steps),
                group["lr"],
                signed,
                unsigned,
                state["exp_avg_scale"],
                state["exp_avg_sq_scale"],
                weight_decay=group["weight_decay"],
            )

    def _code_maps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """What each of the 256 codes stands for, of the first and of the second moment."""
        if self._maps is None:
            make = _bitsandbytes().create_dynamic_map
            self._maps = make(signed=True).to(device), make(signed=False).to(device)
        return self._maps


def _bitsandbytes() -> Any:
    """bitsandbytes' functions. It warns of kernels that are not used here."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes.functional

    return bitsandbytes.functional


def _begin_update(
    weights: Tensor, gradient: Tensor, state: dict[str, Tensor], name: str, withheld: Tensor | None
) -> tuple[Tensor, Tensor | float]:
    """The moment of that name, and the share of the update that is made: none of one that is
    withheld, whose gradient, which may not be finite, becomes zeros."""
    if name not in state:  # DeepSpeed's step with zero gradients, which comes first
        state[name] = torch.zeros_like(weights)
    if withheld is None:
        return state[name], 1.0
    gradient.masked_fill_(withheld.bool(), 0.0)
    return state[name], 1.0 - withheld


class GuardedLion(_Guarded, torch.optim.Optimizer):
    """Lion (Chen et al. 2023, algorithm 2): torch has none.

    With the gradient g, the moment m and the rate r: weights ← weights - r·(sign(beta1·m +
    (1 - beta1)·g) + decay·weights), then m ← beta2·m + (1 - beta2)·g.
    """

    def counts(self, *, is_hidden: bool) -> bool:
        """It does not."""
        return False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """The update, where it is not withheld. Gradients that are not finite are lost then."""
        withheld = self._withheld()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weights in group["params"]:
                if weights.grad is not None:
                    _step_lion(
                        weights,
                        weights.grad,
                        self.state[weights],
                        weight_decay=group["weight_decay"],
                        learning_rate=group["lr"],
                        withheld=withheld,
                        beta1=beta1,
                        beta2=beta2,
                    )


def _step_lion(
    weights: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    *,
    learning_rate: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    withheld: Tensor | None,
) -> None:
    moment, made = _begin_update(weights, gradient, state, "exp_avg", withheld)
    update = moment.lerp(gradient, 1 - beta1).sign_()
    update.add_(weights, alpha=weight_decay).mul_(made)
    weights.add_(update, alpha=-learning_rate)
    moment.lerp_(gradient, torch.as_tensor((1 - beta2) * made, device=moment.device))


class GuardedAdafactor(_Guarded, torch.optim.Adafactor):
    """torch's Adafactor. It waits for the device, for the sizes of each parameter and update."""

    def step(self, closure: Any = None) -> Any:
        """The update, where it is not withheld."""
        withheld = self._withheld()
        if withheld is not None and bool(withheld):
            return None
        return super().step(closure)  # type: ignore[no-untyped-call]


class GuardedMuon(_Guarded, torch.optim.Optimizer):
    """Muon in groups that are `hidden`, AdamW in all others, each as torch has it.

    AdamW works on this optimiser's own groups and states: DeepSpeed exchanges the parameters in
    them. torch's Muon would compute in bf16 everywhere, which a CPU may have no units for.
    """

    def __init__(self, groups: Groups, adamw: Mapping[str, Any], momentum: float) -> None:
        super().__init__(groups, {"lr": 0.0, "fused": True})
        self._momentum = momentum
        others = [group for group in self.param_groups if not group["hidden"]]
        self._adamw = GuardedAdamW(others, **adamw) if others else None
        if self._adamw is not None:
            self._adamw.state = self.state

    def counts(self, *, is_hidden: bool) -> bool:
        """AdamW does."""
        return not is_hidden

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """The update, where it is not withheld. Gradients that are not finite are lost then."""
        if self._adamw is not None:
            self._adamw.withheld = self.withheld
            self._adamw.step()
        withheld = self._withheld()
        for group in self.param_groups:
            for weights in group["params"] if group["hidden"] else ():
                if weights.grad is not None:
                    _step_muon(
                        weights,
                        weights.grad,
                        self.state[weights],
                        learning_rate=group["lr"],
                        weight_decay=group["weight_decay"],
                        momentum=self._momentum,
                        withheld=withheld,
                    )


def _step_muon(
    weights: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float,
    withheld: Tensor | None,
) -> None:
    moment, made = _begin_update(weights, gradient, state, "momentum_buffer", withheld)
    moment.lerp_(gradient, torch.as_tensor((1 - momentum) * made, device=moment.device))
    dtype = torch.bfloat16 if weights.is_cuda else torch.float32
    update = orthogonalize(gradient.lerp(moment, momentum).to(dtype))
    like_adamw = 0.2 * math.sqrt(max(weights.shape))  # its root mean square, as AdamW's usually is
    weights.mul_(1 - learning_rate * weight_decay * made)
    weights.add_(update.mul_(made), alpha=-learning_rate * like_adamw)


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U·Vᵀ of a matrix U·S·Vᵀ, of its dtype: five steps of Newton and Schulz with the
    coefficients of torch's Muon, which leave singular values between 0.5 and 1.5 or so. Changes the
    matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.size(0) > matrix.size(1)
    found = matrix.T if tall else matrix
    found.div_(found.norm().clamp(min=1e-7))
    for _ in range(5):
        gram = found @ found.T
        gram = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        found = torch.addmm(found, gram, found, beta=a)
    return found.T if tall else found


def _build_adamw(groups: Groups, chosen: Any) -> torch.optim.Optimizer:
    betas = (chosen.beta1, chosen.beta2)
    return GuardedAdamW(groups, lr=0.0, betas=betas, eps=chosen.epsilon, fused=True)


def _build_adamw_8bit(groups: Groups, chosen: Any) -> torch.optim.Optimizer:
    betas = (chosen.beta1, chosen.beta2)
    return GuardedAdamW8bit(
        groups, {"lr": 0.0, "betas": betas, "eps": chosen.epsilon, "fused": True}
    )


def _build_sgd(groups: Groups, chosen: Any) -> torch.optim.Optimizer:
    return GuardedSgd(groups, lr=0.0, momentum=chosen.momentum, fused=True)


def _build_lion(groups: Groups, chosen: Any) -> torch.optim.Optimizer:
    return GuardedLion(groups, {"lr": 0.0, "betas": (chosen.beta1, chosen.beta2)})


def _build_adafactor(groups: Groups, chosen: Any) -> torch.optim.Optimizer:
    return GuardedAdafactor(
        groups,
        lr=0.0,
        beta2_decay=chosen.beta2_decay,
        eps=(None, chosen.scale_floor),
        d=chosen.clip_update,
    )


def _build_muon(groups: Groups, chosen: Any) -> torch.optim.Optimizer:
    adamw = {"betas": (chosen.beta1, chosen.beta2), "eps": chosen.epsilon}
    return GuardedMuon(groups, adamw | {"lr": 0.0, "fused": True}, chosen.momentum)


_BUILDERS: Mapping[str, Callable[[Groups, Any], torch.optim.Optimizer]] = {
    "adamw": _build_adamw,
    "adamw_8bit": _build_adamw_8bit,
    "sgd": _build_sgd,
    "lion": _build_lion,
    "adafactor": _build_adafactor,
    "muon": _build_muon,
}


def build_optimizer(groups: Groups, chosen: Optimizer) -> torch.optim.Optimizer:
    """The optimiser that a spec names, with learning rate 0, over groups of parameters with a
    `weight_decay` of their own, and `hidden` where it parts those."""
    return _BUILDERS[chosen.name](groups, chosen)
