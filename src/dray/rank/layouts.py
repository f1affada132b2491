"""Where DeepSpeed keeps model states: one class for each of its optimiser wrappers, chosen once.

A layout knows which tensors the optimiser steps, gives what this rank owns as fragments, and brings
the weights that the passes use up to date after a restore. A fragment is a 1-D run of one
parameter's elements with its optimiser states, as live views.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dray.rank.device import is_queued
from dray.rank.group import Ranks

OPTIMIZER_STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class LiveFragment:
    """Elements [start, start + length) of a parameter: live 1-D views, one a state.

    All are fp32, but for frozen parameters in half precision: those have no fp32 master.
    """

    parameter: str
    start: int
    states: dict[str, Tensor]


class Layout:
    """What every rank holds whole: fp32 without ZeRO, where DeepSpeed steps our optimiser itself.

    `wrapper` is DeepSpeed's around the optimiser, or the optimiser.
    """

    measures_norm = False
    """Whether DeepSpeed measures the gradients' norm; else the engine does."""

    def __init__(self, wrapper: Any, module: torch.nn.Module, ranks: Ranks) -> None:
        self.wrapper, self.module, self.ranks = wrapper, module, ranks
        self.optimizer = getattr(wrapper, "optimizer", wrapper)

    def flats(self) -> list[Tensor]:
        """The fp32 tensors that the optimiser steps."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def link_states(self) -> None:
        """Once the optimiser's states are there: let DeepSpeed know where they are."""

    def fragments(self, *, whole_replicas: bool = False) -> Iterator[LiveFragment]:
        """What this rank owns; over all ranks every element of every parameter exactly once.

        Parameters that every rank holds whole are shared out equally, unless `whole_replicas`.
        """
        masters = self._masters()
        for name, parameter in self.module.named_parameters():
            master = masters.get(id(parameter), parameter)
            fragment = self._fragment(name, parameter, master, whole=whole_replicas)
            if fragment is not None and fragment.states["param"].numel():
                yield fragment

    def refresh(self) -> None:
        """After a restore: copy the fp32 masters into the weights that the passes use."""

    def unscale_norm(self, norm: Tensor, scale: float, next_scale: float) -> Tensor:
        """The gradients' norm from the one that DeepSpeed tells of a step that began with the loss
        scale `scale` and ended with `next_scale`."""
        return norm

    def _masters(self) -> dict[int, Tensor]:
        """The fp32 copies of parameters that every rank holds, by the parameters' ids."""
        return {}

    def _fragment(
        self, name: str, parameter: Any, master: Tensor, *, whole: bool
    ) -> LiveFragment | None:
        """What this rank owns of a parameter: of one that every rank holds an equal part."""
        states = {"param": master.data.view(-1)}
        if parameter.requires_grad:
            held = self.optimizer.state[master]
            states |= {state: held[state].view(-1) for state in OPTIMIZER_STATES}
        share = master.numel() if whole else -(-master.numel() // self.ranks.num_ranks)
        start = 0 if whole else min(master.numel(), self.ranks.rank * share)
        return LiveFragment(
            name, start, {state: view[start : start + share] for state, view in states.items()}
        )


class UnfusedLayout(Layout):
    """Half precision without ZeRO (`FP16_UnfusedOptimizer`): every rank holds fp32 masters of all
    parameters."""

    measures_norm = True

    def refresh(self) -> None:
        for low, high in self._pairs():
            low.data.copy_(high.data)

    def unscale_norm(self, norm: Tensor, scale: float, next_scale: float) -> Tensor:
        return norm / scale  # it tells that of the scaled gradients

    def _masters(self) -> dict[int, Tensor]:
        return {id(low): high for low, high in self._pairs()}

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        groups = zip(self.wrapper.fp16_groups, self.wrapper.fp32_groups, strict=True)
        for lows, highs in groups:
            yield from zip(lows, highs, strict=True)


class PartitionedLayout(Layout):
    """ZeRO 1 and 2 (`DeepSpeedZeroOptimizer`, `BF16_Optimizer`): DeepSpeed maps each parameter to
    its place in this rank's flat fp32 partition."""

    measures_norm = True

    def __init__(self, wrapper: Any, module: torch.nn.Module, ranks: Ranks) -> None:
        super().__init__(wrapper, module, ranks)
        if is_queued(ranks.device) and not getattr(wrapper, "cpu_offload", True):
            measure_and_clip_queued(wrapper)

    def flats(self) -> list[Tensor]:
        for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if found := getattr(self.wrapper, name, None):
                return list(found)
        return super().flats()

    def link_states(self) -> None:
        if hasattr(self.wrapper, "_lazy_init_hp_params_optimizer_state"):
            self.wrapper._lazy_init_hp_params_optimizer_state()

    def refresh(self) -> None:
        if hasattr(self.wrapper, "update_lp_params"):
            self.wrapper.update_lp_params()

    def _fragment(
        self, name: str, parameter: Any, master: Tensor, *, whole: bool
    ) -> LiveFragment | None:
        if not hasattr(parameter, "_hp_mapping"):  # frozen
            return super()._fragment(name, parameter, master, whole=whole)
        mapping = parameter._hp_mapping
        if mapping is None:  # another rank's
            return None
        states = {"param": mapping.hp_fragment}
        states |= {state: mapping.get_optim_state_fragment(state) for state in OPTIMIZER_STATES}
        return LiveFragment(name, mapping.lp_fragment_address.start, states)


def measure_and_clip_queued(wrapper: Any) -> None:
    """Let ZeRO 1 and 2 measure and clip gradients without asking the device, in a few kernels.

    DeepSpeed waits for the device six times a step there, and takes each tensor's norm by itself,
    in fp64. A norm that is not finite stays so: the guarded optimiser makes no update then.
    """

    def norm(norm_type: float = 2) -> Tensor:
        squares = [
            torch.stack(torch._foreach_norm(gradients, norm_type, torch.float32)).double().square()
            for group in wrapper.averaged_gradients.values()
            if (gradients := [g for g in group if not getattr(g, "_zero_padding", False)])
        ]
        zero = torch.zeros(1, dtype=torch.float64, device=wrapper.device)
        total = torch.cat([zero, *squares]).sum()
        dist.all_reduce(total, group=wrapper.dp_process_group)
        return total.sqrt().float()

    def clip(groups: Sequence[Any], total_norm: Tensor) -> None:
        scale: Any = wrapper.loss_scale
        if wrapper.clip_grad > 0.0:
            excess = (total_norm / wrapper.loss_scale + 1e-6) / wrapper.clip_grad
            scale = excess.clamp(min=1.0) * wrapper.loss_scale
        elif scale == 1.0:
            return
        for gradient in groups:
            gradient.mul_(1.0 / scale)

    wrapper.scaled_global_norm, wrapper.unscale_and_clip_grads = norm, clip


class Stage3Layout(Layout):
    """ZeRO 3 (`DeepSpeedZeroOptimizer_Stage3`): of each parameter rank r owns the elements from
    r · partition on; the last partition is padded."""

    measures_norm = True

    def flats(self) -> list[Tensor]:
        return list(self.wrapper.fp32_partitioned_groups_flat)

    def refresh(self) -> None:
        if hasattr(self.wrapper, "update_lp_params"):
            self.wrapper.update_lp_params()
        for group in range(len(self.wrapper.fp32_partitioned_groups_flat)):
            self.wrapper._reassign_or_swap_out_partitioned_parameters(group)
        small = self.wrapper.persistent_parameters  # they stay gathered, and must be gathered anew
        if small:
            small[0].partition(small)
            small[0].all_gather(small)

    def unscale_norm(self, norm: Tensor, scale: float, next_scale: float) -> Tensor:
        return norm * (next_scale / scale)  # it divides by the next step's scale

    def _fragment(
        self, name: str, parameter: Any, master: Tensor, *, whole: bool
    ) -> LiveFragment | None:
        own = parameter.ds_tensor
        if not parameter.requires_grad:
            flat, offset, length = own.data, 0, own.ds_numel
            held: dict[str, Tensor] = {}
        else:
            number = self.wrapper.get_param_id(parameter)
            group, offset, length = self.wrapper.grad_position[number]
            flat = self.wrapper.fp32_partitioned_groups_flat[group]
            held = {state: self.optimizer.state[flat][state] for state in OPTIMIZER_STATES}
        start = self.ranks.rank * own.ds_numel
        length = max(0, min(length, parameter.ds_numel - start))
        views = {"param": flat.data, **held}
        return LiveFragment(
            name, start, {state: view.narrow(0, offset, length) for state, view in views.items()}
        )


def choose_layout(
    wrapper: Any, module: torch.nn.Module, ranks: Ranks, *, stage: int, precision: str
) -> Layout:
    """The layout of DeepSpeed's wrapper under a ZeRO stage and precision."""
    if stage == 0:
        kind: type[Layout] = Layout if precision == "fp32" else UnfusedLayout
    else:
        kind = Stage3Layout if stage == 3 else PartitionedLayout
    return kind(wrapper, module, ranks)
