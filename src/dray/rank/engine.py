"""DeepSpeed: build, forward, backward, step, and the model states as named fragments.

A checkpoint is a copy out of the fragments (`layouts.py`) and a restore a copy into them, whatever
stage and number of ranks wrote it. DeepSpeed's own save and load are not used: they refuse another
number of ranks and unpickle what they read. Only this file imports DeepSpeed; its configuration is
the plan's (`plan/zero_config.py`).
"""

from __future__ import annotations

import functools
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dray.errors import StoreError
from dray.models.adapters import used_besides
from dray.models.build import compile_model
from dray.models.freezing import is_base
from dray.models.groups import part_hidden
from dray.models.initialize import Gathering, no_gathering
from dray.plan import Plan
from dray.processes.imports import first_import
from dray.rank.group import Ranks
from dray.rank.hooks import Hook, Part, Stepped, Whole
from dray.rank.layouts import LiveFragment, choose_layout
from dray.rank.optimizers import build_optimizer
from dray.spec import Optimizer, State

_COMPUTE_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FragmentReader(Protocol):
    """Where a restore reads from: `dray.runs.CheckpointReader` or anything like it."""

    def read(self, name: str, state: str, start: int, count: int) -> Tensor: ...

    def has(self, name: str, state: str) -> bool: ...


@dataclass(frozen=True)
class Update:
    """What became of a step: the global gradient norm before clipping (fp64, NaN where there is
    none), and whether the weights were updated (bool). Both lie on the device, where they may still
    be in the making."""

    grad_norm: Tensor
    applied: Tensor


ModelBuilder = Callable[[AbstractContextManager[Any], Gathering], torch.nn.Module]
"""Builds the model in a constructing context and sets parameters in a gathering one, both of which
ZeRO-3 needs."""
ObjectiveMaker = Callable[[torch.nn.Module], torch.nn.Module]
"""Puts the loss around the model: ZeRO-3 gathers what it uses, and a compiler sees it."""


class Engine:
    """One rank's part of the model and its optimiser."""

    def __init__(
        self,
        deepspeed_engine: Any,
        module: torch.nn.Module,
        plan: Plan,
        ranks: Ranks,
        *,
        optimizer: Optimizer,
        hooks: Sequence[Hook] = (),
        wholes: Mapping[str, Whole] | None = None,
        calendar: Calendar | None = None,
    ) -> None:
        self._engine = deepspeed_engine
        self.module = module
        """The model itself, without the loss around it: its names are those of checkpoints."""
        self._ranks = ranks
        self.stage = plan.zero_stage
        self._clip = plan.deepspeed.get("gradient_clipping") or None
        self._wrapper = deepspeed_engine.optimizer
        self._layout = choose_layout(
            self._wrapper, module, ranks, stage=self.stage, precision=plan.precision
        )
        self._optimizer = self._layout.optimizer
        self._base = {name for name, p in module.named_parameters() if is_base(p)}
        self._shapes = {
            name: tuple(getattr(p, "ds_shape", p.shape))
            for name, p in self.module.named_parameters()
            if name not in self._base
        }
        self._hooks = hooks
        self._layout.create_states(functools.partial(_declare, optimizer, hooks))
        for hook in hooks:
            self._begin(hook)
        self._num_updates = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self._calendar = calendar or Calendar()
        self._withhold: Tensor | None = None
        self._norm: Tensor | None = None
        self._withheld: Tensor | None = None
        self._optimizer.withheld = self._is_withheld
        self._step = 0
        self._wholes = wholes or {}
        if any(hook.works_on_parts for hook in hooks):
            self._surround_updates()

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shapes by name of what checkpoints hold; tied parameters appear once."""
        return self._shapes

    @property
    def state_shapes(self) -> dict[str, dict[str, list[int]]]:
        """Full shapes, by parameter and state, of what is kept in another shape than the
        parameter's."""
        return self._layout.state_shapes()

    @property
    def num_updates(self) -> int:
        """Updates made since the initial weights. Waits for the device."""
        return int(self._num_updates)

    @property
    def loss_scale(self) -> float:
        """The current loss scale; 1 except in fp16."""
        return float(self._loss_scaler.cur_scale) if self._loss_scaler is not None else 1.0

    def loss_scale_state(self) -> dict[str, float]:
        """The loss scale and how far it is on its way to the next growth; empty except in fp16."""
        scaler = self._loss_scaler
        if scaler is None:
            return {}
        return {
            "scale": float(scaler.cur_scale),
            "steady_steps": scaler.cur_iter - scaler.last_overflow_iter - 1,
        }

    @property
    def _loss_scaler(self) -> Any:
        """What holds DeepSpeed's dynamic loss scale, under ZeRO and without it; none except in
        fp16."""
        scaler = getattr(self._wrapper, "loss_scaler", None) or getattr(
            self._wrapper, "loss_scale_config", None
        )
        return scaler if getattr(scaler, "last_overflow_iter", None) is not None else None

    def __call__(self, *inputs: Any, **named_inputs: Any) -> Any:
        """The forward pass of the objective: a batch's loss and what the metrics need."""
        if self._engine.training:
            for hook in self._hooks:
                hook.before_forward(self.module)
        return self._engine(*inputs, **named_inputs)

    def probe(self, *inputs: Any) -> Any:
        """The same pass for gradients of what goes in alone: DeepSpeed, which wants a backward pass
        of its own after each of its forward passes, does not know of it."""
        return self._engine.module(*inputs)

    def train(self, mode: bool) -> None:
        self._engine.train(mode)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`, which is already normalised; below ZeRO-2 only the last one
        communicates."""
        self._engine.set_gradient_accumulation_boundary(last)
        if self.stage == 0:
            loss = (
                loss * self.loss_scale
            )  # without ZeRO DeepSpeed divides the gradients by it, and no more
        self._engine.backward(loss, scale_wrt_gas=False)
        if last:
            for hook in self._hooks:
                hook.after_backward(self.module)

    def begin_step(self, step: int) -> None:
        """Say which step (from 1 on) the next passes are of: groups may be trained only from a
        `first_step` on. Without a word all are trained."""
        self._calendar.step = self._step = step

    def step(self, learning_rate: float, *, withhold: Tensor | None = None) -> Update:
        """Update the weights, unless `withhold` (bool) says not to or the gradient norm, which all
        ranks share, is not finite. dray itself does not wait for the device here."""
        for group in self._optimizer.param_groups:
            self._calendar.set_rate(group, learning_rate)
        self._withhold, self._norm, self._withheld = withhold, None, None
        scale = self.loss_scale
        if not self._layout.measures_norm:
            parameters = [p for p in self.module.parameters() if p.grad is not None]
            # Summed in fp64 like ZeRO's: in fp32 the norm of a large tensor is off by 2e-4, and the
            # losses drift apart.
            norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters]
            norm = torch.linalg.vector_norm(torch.stack(norms))
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip or float("inf"), norm)
            self._norm = norm
        self._engine.step()
        norm = self._layout.unscale_norm(self._global_norm(), scale, self.loss_scale)
        applied = torch.isfinite(norm)
        if withhold is not None:
            applied &= ~withhold
        if getattr(self._wrapper, "overflow", False):
            applied = torch.zeros_like(applied)
        self._num_updates += applied
        with torch.no_grad():
            for hook in self._hooks:
                hook.after_update(self._stepped(hook), self._num_updates, applied)
        return Update(norm, applied)

    def _stepped(self, hook: Hook) -> list[Stepped]:
        """What the optimiser steps on this rank, with what the hook keeps for it."""
        states = self._optimizer.state
        return [
            Stepped(flat, {name: states[flat][name] for name in hook.states})
            for flat in self._layout.flats()
        ]

    @torch.no_grad()
    def _begin(self, hook: Hook) -> None:
        for stepped in self._stepped(hook):
            hook.begin(stepped)

    def _surround_updates(self) -> None:
        """Call the hooks around each of the optimiser's updates: one of a group of parameters under
        ZeRO, whose wrappers call `step` themselves."""
        update = self._optimizer.step

        def step(closure: Any = None) -> Any:
            parts = self._parts()
            with torch.no_grad():
                for hook in self._hooks:
                    hook.before_update(parts, self._step)
            result = update(closure)
            with torch.no_grad():
                for hook in self._hooks:
                    hook.after_update_of(parts, self._wholes, self._total_of_parts)
            return result

        self._optimizer.step = step

    def _parts(self) -> list[Part]:
        """What the optimiser is about to step on this rank."""
        gradients = {
            flat: flat.grad.view(-1)
            for group in self._optimizer.param_groups
            for flat in group["params"]
            if flat.grad is not None
        }
        return [
            Part(name, start, weights, found[at : at + len(weights)], self._wholes[name])
            for name, start, weights, flat, at in self._layout.places()
            if (found := gradients.get(flat)) is not None and name in self._wholes
        ]

    def _total_of_parts(self, mine: Tensor) -> Tensor:
        if not self._layout.parts_among_ranks:
            return mine
        return self._ranks.total(mine.to(self._ranks.device)).to(mine.device)

    def _is_withheld(self) -> Tensor:
        """Asked once a group of parameters; the answer is the same for all groups of a step."""
        if self._withheld is None:
            bad = ~torch.isfinite(self._global_norm())
            self._withheld = (bad if self._withhold is None else bad | self._withhold).float()
        return self._withheld

    def _global_norm(self) -> Tensor:
        """Ours, or the one that DeepSpeed's wrapper measures before it steps; it says -1 for one
        that is not finite."""
        found = (
            self._norm
            if self._norm is not None
            else getattr(self._wrapper, "_global_grad_norm", None)
        )
        norm = torch.as_tensor(
            float("nan") if found is None else found, dtype=torch.float64, device=self._ranks.device
        )
        return torch.where(norm < 0, torch.nan, norm)

    def fragments(self, *, whole_replicas: bool = False) -> Iterator[LiveFragment]:
        """What this rank owns (`Layout.fragments`) of what checkpoints hold: what stays as it came
        with the model is made again from there."""
        for fragment in self._layout.fragments(whole_replicas=whole_replicas):
            if fragment.parameter not in self._base:
                yield fragment

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers by name. Rank 0's are saved, and every rank restores those."""
        return {
            name: buffer for name, buffer in self.module.named_buffers() if self._persists(name)
        }

    def restore(
        self, reader: FragmentReader, optimizer_step: int, loss_scale: Mapping[str, float]
    ) -> None:
        """Copy this rank's ranges out of a checkpoint, of whatever stage and number of ranks.

        `loss_scale`: what `loss_scale_state` was. Hooks that the checkpoint knows nothing of begin
        with its weights.
        """
        new = {name for hook in self._hooks for name in hook.states}
        with torch.no_grad():
            for name, state, start, view in self.fragments(whole_replicas=True):
                if state not in new or reader.has(name, state):
                    new.discard(state)
                    held = reader.read(name, state, start, view.numel())
                    if state != "param" and held.dtype != view.dtype:
                        raise StoreError(
                            f"the checkpoint's {state} of {name}",
                            f"is {held.dtype}, and {view.dtype} is kept of it now",
                            "numbers of one kind are no other's",
                            "go on with the optimiser's settings that it was trained with",
                        )
                    view.copy_(held)
            for hook in self._hooks:
                if new.intersection(hook.states):
                    self._begin(hook)
            for name, buffer in self.buffers().items():
                buffer.copy_(reader.read(name, "buffer", 0, buffer.numel()).reshape(buffer.shape))
            self._set_optimizer_step(optimizer_step)
            self._num_updates.fill_(optimizer_step)
            self._layout.refresh()
            if self._loss_scaler is not None:
                self._loss_scaler.cur_scale = loss_scale["scale"]
                self._loss_scaler.cur_iter, self._loss_scaler.last_overflow_iter = (
                    int(loss_scale["steady_steps"]),
                    -1,
                )

    def _set_optimizer_step(self, step: int) -> None:
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(float(step))

    def _persists(self, name: str) -> bool:
        owner_name, _, leaf = name.rpartition(".")
        return leaf not in self.module.get_submodule(owner_name)._non_persistent_buffers_set


class Calendar:
    """Which step it is, for groups of parameters that are trained from a `first_step` on.

    Until then their gradients are zeros, so that they count for no norm and leave no trace in what
    the optimiser keeps, and so are rate and decay. ZeRO has its buffers for them from the start on,
    which could not be made under way.
    """

    def __init__(self) -> None:
        self.step: int | None = None

    def watch(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Silence the gradients of groups that are not trained yet."""
        for group in groups:
            first = group.get("first_step", 1)
            for parameter in group["params"] if first > 1 else ():
                parameter.register_hook(functools.partial(self._silenced, first))

    def set_rate(self, group: dict[str, Any], learning_rate: float) -> None:
        """Set what the optimiser does with a group at this step."""
        scale = group.get("rate_scale", 1.0)
        if "first_step" in group:
            decay = group.setdefault("own_decay", group["weight_decay"])
            sleeps = self._is_before(group["first_step"])
            group["weight_decay"] = 0.0 if sleeps else decay
            scale = 0.0 if sleeps else scale
        group["lr"] = learning_rate * scale

    def _silenced(self, first: int, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient) if self._is_before(first) else gradient

    def _is_before(self, first: int) -> bool:
        return self.step is not None and self.step < first


def build_engine(
    build_model: ModelBuilder,
    make_groups: Callable[[torch.nn.Module], list[dict[str, Any]]],
    optimizer: Optimizer,
    plan: Plan,
    ranks: Ranks,
    *,
    make_objective: ObjectiveMaker | None = None,
    hooks: Sequence[Hook] = (),
) -> Engine:
    """Build the model under the plan's ZeRO stage and hand it to DeepSpeed, with its loss around
    it.

    `make_groups` gives the optimiser's parameter groups, `make_objective` the module that is
    called; without it that is the model. The learning rate is set at each step.
    """
    deepspeed = import_deepspeed(ranks.device.type)
    deepspeed.init_distributed(
        dist_backend="nccl" if ranks.device.type == "cuda" else "gloo", auto_mpi_discovery=False
    )
    config = dict(plan.deepspeed)
    constructing: AbstractContextManager[Any] = _parameters_at(
        ranks.device, _COMPUTE_TYPES[plan.precision]
    )
    gathering: Gathering = no_gathering
    if plan.zero_stage == 3:
        constructing = deepspeed.zero.Init(config_dict_or_path=config)
        gathering = functools.partial(deepspeed.zero.GatheredParameters, modifier_rank=0)
    if plan.zero_stage == 0 and plan.precision == "fp32":
        config["gradient_clipping"] = 0.0  # Engine.step clips, and keeps the norm
    model = build_model(constructing, gathering)
    if plan.zero_stage < 3:
        model.to(ranks.device)  # what is not a parameter
    else:
        for module, parameter in used_besides(model):
            deepspeed.zero.register_external_parameter(module, parameter)
    groups = make_groups(model)
    if optimizer.parts_hidden:
        groups = part_hidden(model, groups)
    calendar = Calendar()
    calendar.watch(groups)
    wholes = _wholes(model, groups)
    stepping = build_optimizer(groups, optimizer)
    objective = model if make_objective is None else make_objective(model)
    deepspeed_engine, *_ = deepspeed.initialize(model=objective, optimizer=stepping, config=config)
    wrapper = deepspeed_engine.optimizer
    if hasattr(wrapper, "fp16_groups") and hasattr(wrapper, "fp32_groups"):
        wrapper.step = functools.partial(_step_at_once, wrapper)
    if plan.compile:
        compile_model(model)
    return Engine(
        deepspeed_engine,
        model,
        plan,
        ranks,
        optimizer=optimizer,
        hooks=hooks,
        wholes=wholes,
        calendar=calendar,
    )


def _wholes(module: torch.nn.Module, groups: Sequence[Mapping[str, Any]]) -> dict[str, Whole]:
    """The parameters of the optimiser's groups by name, in the module's order."""
    from transformers.pytorch_utils import Conv1D

    penalized = {id(p) for group in groups if group.get("penalized") for p in group["params"]}
    turned = {id(part.weight) for part in module.modules() if isinstance(part, Conv1D)}
    return {
        name: Whole(
            tuple(getattr(parameter, "ds_shape", parameter.shape)),
            is_penalized=id(parameter) in penalized,
            inputs_first=id(parameter) in turned,
        )
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def _declare(
    optimizer: Optimizer, hooks: Sequence[Hook], shape: tuple[int, ...], *, is_hidden: bool
) -> list[State]:
    """What the optimiser and the hooks keep for a parameter."""
    own = optimizer.states(shape, is_hidden=is_hidden)
    return [*own, *(State(name, shape) for hook in hooks for name in hook.states)]


@contextmanager
def _parameters_at(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Below ZeRO-3: parameters come into being on the device and in the type that the passes use,
    one at a time.

    Buffers keep their precision. Values are those of a model built in fp32 and cast afterwards, as
    DeepSpeed would.
    """
    register = torch.nn.Module.register_parameter

    def register_cast(
        module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None
    ) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(device, dtype)

    torch.nn.Module.register_parameter = register_cast  # type: ignore[assignment,method-assign]
    try:
        with device:
            yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


@torch.no_grad()
def _step_at_once(wrapper: Any, closure: Any = None) -> bool:
    """`FP16_UnfusedOptimizer.step`, stage 0's in half precision, in a few kernels for all tensors
    together.

    DeepSpeed's own loops over the tensors in Python and asks the device about each. In bf16 this
    waits for nothing: a norm that is not finite is the guarded optimiser's business. Returns
    whether fp16 overflowed.
    """
    lows = [low for group in wrapper.fp16_groups for low in group]
    highs = [high for group in wrapper.fp32_groups for high in group]
    gradients = [torch.empty_like(high) for high in highs]
    torch._foreach_copy_(
        gradients, [torch.zeros_like(low) if low.grad is None else low.grad for low in lows]
    )
    norm = torch.nn.utils.get_total_norm(gradients)
    scales = wrapper.loss_scale_config.use_grad_scaling
    wrapper.overflow, wrapper._global_grad_norm = False, norm
    if scales and not math.isfinite(norm):
        return bool(wrapper._skip_invalid_grad_norm())
    wrapper._update_scale(False)
    scale = (
        wrapper.loss_scale_config.cur_scale
    )  # after it may have grown, as under ZeRO: the stages must agree
    if wrapper.clip_grad or scale != 1.0:
        excess = (
            (norm / scale + 1e-6) / wrapper.clip_grad
            if wrapper.clip_grad
            else torch.ones_like(norm)
        )
        torch._foreach_mul_(gradients, 1.0 / (scale * excess.clamp(min=1.0)))
    for high, gradient in zip(highs, gradients, strict=True):
        high.grad = gradient
    wrapper.optimizer.step()
    for high in highs:
        high.grad = None
    torch._foreach_copy_(lows, highs)
    return False


def import_deepspeed(device_type: str) -> Any:
    """DeepSpeed picks its accelerator when it is imported, talks a lot, and prepares for what dray
    never asks of it."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device_type == "cuda" else "cpu")
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with first_import("deepspeed", without=("mlflow",)):
        import deepspeed
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # ZeRO-3 calls what torch has renamed, hundreds of times a step: a rank's log should hold what
    # went wrong.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # A shared-memory collective for inference alone, compiled for half a minute where a C++
    # compiler is there.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    _import_muon()
    return deepspeed


def _import_muon() -> None:
    """Muon's functions are decorated by torch.compile when they are imported, which would load all
    of Inductor in every rank: they are compiled when they are called first."""
    own = torch.compile

    def compile_when_called(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile_when_called, **options)

        @functools.cache
        def compiled() -> Any:
            return torch.compile(function, **options)  # by then it is torch's own again

        @functools.wraps(function)
        def call(*inputs: Any, **named_inputs: Any) -> Any:
            return compiled()(*inputs, **named_inputs)

        return call

    torch.compile = compile_when_called  # type: ignore[assignment]
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        torch.compile = own
