"""Initial weights as a pure function of (model, seed): bit for bit the same under every ZeRO stage
and number of ranks.

Every module draws from a generator of its own, seeded by the run's seed and the module's name,
through the architecture's own initialisation. It draws in fp32 on the CPU, whatever the precision
and device of the parameters. No random state outside is touched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Gathering = Callable[[list[Any]], AbstractContextManager[Any]]
"""Makes partitioned parameters whole for a while; on leaving, rank 0's values become everyone's."""


def no_gathering(parameters: list[Any]) -> AbstractContextManager[Any]:
    """For parameters that every rank holds whole."""
    return nullcontext()


def initialize_weights(model: Any, seed: int, gathering: Gathering = no_gathering) -> None:
    """Draw the initial weights of a transformers model, one module at a time, children before
    parents.

    Parents come last because some set their children's weights anew (GPT-2 scales its residual
    projections). Of tied parameters the one that is tied to is drawn, whether they are tied already
    or not.
    """
    tied, scratch = set(model.all_tied_weights_keys), _Scratch()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for name, module, initialize in _modules(model, "", model._init_weights):
            parameters = _reached_parameters(module)
            torch.default_generator.manual_seed(_module_seed(seed, name))
            if parametrize.is_parametrized(module):
                _draw_parametrized(module, gathering, scratch)
                continue
            if not parameters:
                initialize(module)
                continue
            with gathering(parameters):
                if draws_here(parameters[0]):
                    with (
                        _in_fp32_on_cpu(parameters, scratch),
                        _left_alone(_own_parameters(module, name, tied)),
                    ):
                        initialize(module)
    model.tie_weights()
    restore_rotary_buffers(model)


def _draw_parametrized(module: Any, gathering: Gathering, scratch: _Scratch) -> None:
    """Draw a tensor that is computed of others, such as a weight and its norm, as torch's layers
    draw theirs: architectures would draw what is computed, which is then forgotten."""
    for name, made in module.parametrizations.items():
        parts = list(made.parameters(recurse=False))
        with gathering(parts):
            if draws_here(parts[0]):
                with _in_fp32_on_cpu(parts, scratch):
                    drawn = torch.empty(getattr(module, name).shape, dtype=torch.float32)
                    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
                    values = made[0].right_inverse(drawn)
                    for part, value in zip(parts, values, strict=True):
                        part.copy_(value)


def restore_rotary_buffers(model: nn.Module) -> None:
    """Recompute rotary frequencies in fp32: in half precision positions beyond a few hundred lose
    their distinctness.

    For use after anything that casts a whole model (`model.bfloat16()`, DeepSpeed's initialisation
    in bf16 and fp16).
    """
    for module in model.modules():
        if "RotaryEmbedding" not in type(module).__name__ or not hasattr(module, "config"):
            continue
        fresh: Any = type(module)(module.config)
        for name, buffer in fresh.named_buffers(recurse=False):
            device = getattr(module, name).device
            setattr(module, name, buffer.to(device) if buffer.is_floating_point() else buffer)


def draws_here(parameter: Any) -> bool:
    """Whether this rank's values count: of a partitioned parameter rank 0's are taken by all."""
    partitioned = hasattr(parameter, "ds_id")
    return not (
        partitioned and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0
    )


def _module_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


def _modules(module: nn.Module, name: str, initialize: Any) -> Iterator[tuple[str, nn.Module, Any]]:
    """Every module after its children, with the initialisation of the nearest transformers model
    above it."""
    from transformers import PreTrainedModel

    for child_name, child in module.named_children():
        inner = child._init_weights if isinstance(child, PreTrainedModel) else initialize
        yield from _modules(child, f"{name}.{child_name}" if name else child_name, inner)
    yield name, module, initialize


def _reached_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What a module's initialisation may touch: its own parameters and its children's."""
    children = (
        parameter for child in module.children() for parameter in child.parameters(recurse=False)
    )
    return list(dict.fromkeys([*module.parameters(recurse=False), *children]))


def _own_parameters(module: nn.Module, name: str, wanted: set[str]) -> list[nn.Parameter]:
    prefix = f"{name}." if name else ""
    return [p for leaf, p in module.named_parameters(recurse=False) if prefix + leaf in wanted]


@contextmanager
def _left_alone(parameters: Sequence[Any]) -> Iterator[None]:
    """Transformers' own mark: its initialisation passes over these."""
    for parameter in parameters:
        parameter._is_hf_initialized = True
    try:
        yield
    finally:
        for parameter in parameters:
            del parameter._is_hf_initialized


class _Scratch:
    """Room for the values of one module, kept for the next: freed blocks of all sizes would hold as
    much again."""

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors in fp32 on the CPU, until the next call."""
        sizes = [tensor.numel() for tensor in tensors]
        if sum(sizes) > self._room.numel():
            self._room = torch.empty(0)
            self._room = torch.empty(sum(sizes), dtype=torch.float32, device="cpu")
        places = torch.split(self._room[: sum(sizes)], sizes)
        return [
            place.view(tensor.shape).copy_(tensor)
            for place, tensor in zip(places, tensors, strict=True)
        ]


@contextmanager
def _in_fp32_on_cpu(parameters: Sequence[nn.Parameter], scratch: _Scratch) -> Iterator[None]:
    """Stand-ins to draw into, copied back at the end, so that the bits depend on neither precision
    nor device."""
    elsewhere = [p for p in parameters if p.device.type != "cpu" or p.dtype != torch.float32]
    homes = [parameter.data for parameter in elsewhere]
    for parameter, stand_in in zip(elsewhere, scratch.copies(homes), strict=True):
        parameter.data = stand_in
    try:
        yield
    finally:
        for parameter, home in zip(elsewhere, homes, strict=True):
            home.copy_(parameter.data)
            parameter.data = home
