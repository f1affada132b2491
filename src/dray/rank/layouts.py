"""Where DeepSpeed keeps model states: one class for each of its optimiser wrappers, chosen once.

A layout knows which tensors the optimiser steps, makes what is kept for them, gives what this rank
owns as fragments, and brings the weights that the passes use up to date after a restore. A fragment
is a 1-D run of the elements of a parameter or of one of its states, as a live view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dray.rank.device import is_queued
from dray.rank.group import Ranks
from dray.spec import State

Declare = Callable[..., Sequence[State]]
"""(shape, is_hidden=…) → what the optimiser and hooks keep for a parameter of that shape."""
Owned = tuple[str, int, Tensor]


class LiveFragment(NamedTuple):
    """A parameter's elements from `start` on, or those of one of its states, as a live 1-D view.

    Parameters are fp32, but for frozen ones in half precision: those have no fp32 master.
    """

    parameter: str
    state: str
    start: int
    view: Tensor


class Layout:
    """What every rank holds whole: fp32 without ZeRO, where DeepSpeed steps our optimiser itself.

    `wrapper` is DeepSpeed's around the optimiser, or the optimiser.
    """

    measures_norm = False
    """Whether DeepSpeed measures the gradients' norm; else the engine does."""
    parts_among_ranks = False
    """Whether each rank steps a part of its own of the parameters; else all step all of them."""

    def __init__(self, wrapper: Any, module: torch.nn.Module, ranks: Ranks) -> None:
        self.wrapper, self.module, self.ranks = wrapper, module, ranks
        self.optimizer = getattr(wrapper, "optimizer", wrapper)
        self.kept: dict[Tensor, tuple[State, ...]] = {}
        """What is kept for each tensor that the optimiser steps."""

    def flats(self) -> list[Tensor]:
        """The fp32 tensors that the optimiser steps."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def create_states(self, declare: Declare) -> None:
        """Make what is declared, as zeros: optimisers would wait for the first step, which a
        checkpoint of step 0 and a restore come before. Some of DeepSpeed's wrappers have made some
        by a step with zero gradients; what that left in them is put back, and what is not as
        it is declared is made anew."""
        hidden = {
            p
            for group in self.optimizer.param_groups
            if group.get("hidden")
            for p in group["params"]
        }
        on_device = self.optimizer.defaults.get("fused")
        for flat in self.flats():
            is_hidden = flat in hidden
            self.kept[flat] = tuple(declare(tuple(flat.shape), is_hidden=is_hidden))
            state = self.optimizer.state[flat]
            for made in state.values():
                made.zero_()
            if self.optimizer.counts(is_hidden=is_hidden):
                device = flat.device if on_device else torch.device("cpu")
                state.setdefault("step", torch.zeros((), dtype=torch.float32, device=device))
            for name, shape, dtype in self.kept[flat]:
                kind, made = getattr(torch, dtype), state.get(name)
                if made is None or (made.dtype, tuple(made.shape)) != (kind, shape):
                    state[name] = torch.zeros(shape, dtype=kind, device=flat.device)
        self._link_states()

    def _link_states(self) -> None:
        """Let DeepSpeed know where the states are."""

    def fragments(self, *, whole_replicas: bool = False) -> Iterator[LiveFragment]:
        """What this rank owns; over all ranks every element of every parameter exactly once.

        Parameters that every rank holds whole are shared out equally, unless `whole_replicas`.
        """
        masters = self._masters()
        for name, parameter in self.module.named_parameters():
            master = masters.get(id(parameter), parameter)
            for state, start, view in self._owned(parameter, master, whole=whole_replicas):
                if view.numel():
                    yield LiveFragment(name, state, start, view)

    def places(self) -> list[tuple[str, int, Tensor, Tensor, int]]:
        """What the optimiser steps on this rank, as (parameter's name, its first element, the
        elements as a 1-D view, the tensor that is stepped, the first element in that)."""
        flats: dict[int, list[Tensor]] = {}
        for flat in self.flats():
            flats.setdefault(flat.untyped_storage().data_ptr(), []).append(flat)
        found = []
        for name, state, start, view in self.fragments(whole_replicas=True):
            if state != "param":
                continue
            for flat in flats.get(view.untyped_storage().data_ptr(), ()):
                at = int(view.storage_offset()) - int(flat.storage_offset())
                if 0 <= at < flat.numel():
                    found.append((name, start, view, flat, at))
        return found

    def state_shapes(self) -> dict[str, dict[str, list[int]]]:
        """By parameter and state the shapes of what is kept in another shape than the
        parameter's. There is such only where parameters are whole."""
        masters, found = self._masters(), dict[str, dict[str, list[int]]]()
        for name, parameter in self.module.named_parameters():
            master = masters.get(id(parameter), parameter)
            for kept in self.kept.get(master, ()):
                if kept.shape != tuple(master.shape):
                    found.setdefault(name, {})[kept.name] = list(kept.shape)
        return found

    def refresh(self) -> None:
        """After a restore: copy the fp32 masters into the weights that the passes use."""

    def unscale_norm(self, norm: Tensor, scale: float, next_scale: float) -> Tensor:
        """The gradients' norm from the one that DeepSpeed tells of a step that began with the loss
        scale `scale` and ended with `next_scale`."""
        return norm

    def _masters(self) -> dict[int, Tensor]:
        """The fp32 copies of parameters that every rank holds, by the parameters' ids."""
        return {}

    def _owned(self, parameter: Any, master: Tensor, *, whole: bool) -> Iterator[Owned]:
        """(state, first element, view) of what this rank owns of a parameter and its states: of
        what every rank holds an equal part."""
        held = {"param": master.data}
        if parameter.requires_grad:
            held |= {
                kept.name: self.optimizer.state[master][kept.name] for kept in self.kept[master]
            }
        for state, tensor in held.items():
            share = tensor.numel() if whole else -(-tensor.numel() // self.ranks.num_ranks)
            start = 0 if whole else min(tensor.numel(), self.ranks.rank * share)
            yield state, start, tensor.view(-1)[start : start + share]


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
    parts_among_ranks = True

    def __init__(self, wrapper: Any, module: torch.nn.Module, ranks: Ranks) -> None:
        super().__init__(wrapper, module, ranks)
        if is_queued(ranks.device) and not getattr(wrapper, "cpu_offload", True):
            measure_and_clip_queued(wrapper)

    def flats(self) -> list[Tensor]:
        for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if found := getattr(self.wrapper, name, None):
                return list(found)
        return super().flats()

    def _link_states(self) -> None:
        if hasattr(self.wrapper, "_lazy_init_hp_params_optimizer_state"):
            self.wrapper._lazy_init_hp_params_optimizer_state()

    def refresh(self) -> None:
        if hasattr(self.wrapper, "update_lp_params"):
            self.wrapper.update_lp_params()

    def _owned(self, parameter: Any, master: Tensor, *, whole: bool) -> Iterator[Owned]:
        if not hasattr(parameter, "_hp_mapping"):  # frozen
            yield from super()._owned(parameter, master, whole=whole)
            return
        mapping = parameter._hp_mapping
        if mapping is None:  # another rank's
            return
        start, place = mapping.lp_fragment_address.start, mapping.hp_fragment_address
        flat = self.flats()[mapping.param_group_index]
        yield "param", start, mapping.hp_fragment
        for kept in self.kept[flat]:
            state = self.optimizer.state[flat][kept.name]
            yield kept.name, start, state.narrow(0, place.start, place.numel)


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
    parts_among_ranks = True

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

    def _owned(self, parameter: Any, master: Tensor, *, whole: bool) -> Iterator[Owned]:
        own = parameter.ds_tensor
        if not parameter.requires_grad:
            held, offset, length = {"param": own.data}, 0, own.ds_numel
        else:
            number = self.wrapper.get_param_id(parameter)
            group, offset, length = self.wrapper.grad_position[number]
            flat = self.wrapper.fp32_partitioned_groups_flat[group]
            held = {"param": flat.data}
            held |= {kept.name: self.optimizer.state[flat][kept.name] for kept in self.kept[flat]}
        start = self.ranks.rank * own.ds_numel
        length = max(0, min(length, parameter.ds_numel - start))
        for state, tensor in held.items():
            yield state, start, tensor.narrow(0, offset, length)


def choose_layout(
    wrapper: Any, module: torch.nn.Module, ranks: Ranks, *, stage: int, precision: str
) -> Layout:
    """The layout of DeepSpeed's wrapper under a ZeRO stage and precision."""
    if stage == 0:
        kind: type[Layout] = Layout if precision == "fp32" else UnfusedLayout
    else:
        kind = Stage3Layout if stage == 3 else PartitionedLayout
    return kind(wrapper, module, ranks)
