"""Weights in fewer bytes: how a matrix becomes codes and scales and back, and layers that compute
with them as they are.

A packed weight is what a checkpoint stores of it: `weight_half` (bf16 or fp16), or `weight_codes`
with `weight_scales`, what a code counts. `pack` and `unpacked` are each other's inverse as far as
the format allows; `install` puts layers into a model that hold nothing else. Refuses to train:
there is no gradient of a code.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dray.errors import StoreError

FormatName = Literal["bf16", "fp16", "int8", "int4"]
Activations = Literal["fp32", "dynamic", "static"]
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_INT8_MOST, _INT4_MOST = 127, 7


@dataclass(frozen=True)
class Packing:
    """How a weight is stored, and what its layer computes with: plain values, which a checkpoint's
    manifest holds."""

    format: FormatName
    group: int = 0
    """Weights of a row that share a scale; 0: the whole row does."""
    across: bool = False
    """Whether outputs are columns, as in transformers' Conv1D: then the weight is stored turned."""
    activations: Activations = "fp32"
    """`dynamic`: what goes in becomes codes by its own range at each pass; `static`: by `low` and
    `high`."""
    low: float = 0.0
    high: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Self:
        """Raises StoreError for what this version does not know."""
        try:
            found = cls(**value)
        except TypeError as error:
            raise StoreError(where, f"holds weights in a way that is not known ({error})") from None
        if found.format not in (*_HALVES, "int8", "int4"):
            raise StoreError(
                where,
                f"holds weights as {found.format!r}",
                f"this dray knows {', '.join(_HALVES)}, int8 and int4",
                "read it with the version that wrote it",
            )
        return found


@dataclass(frozen=True)
class Packed:
    """A weight as it is stored: its tensors by state, and the shape that it unpacks to."""

    packing: Packing
    shape: tuple[int, ...]
    states: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.states.values())

    def unpacked(self) -> Tensor:
        """The weight in fp32, in its own shape."""
        rows = unpack_rows(self.packing, self.states, _rows_shape(self.packing, self.shape))
        return rows.T.contiguous() if self.packing.across else rows.reshape(self.shape)


def pack(weight: Tensor, packing: Packing) -> Packed:
    """A weight of at least one dimension in a format. int8: symmetric codes -127 … 127 a row; int4:
    -7 … 7 a group of a row, two a byte. A scale is the greatest magnitude by the greatest code, so
    a weight is off by half a scale at most.
    """
    shape = tuple(weight.shape)
    if packing.format in _HALVES:
        return Packed(packing, shape, {"weight_half": weight.detach().to(_HALVES[packing.format])})
    rows = weight.detach().float()
    rows = rows.T.contiguous() if packing.across else rows.reshape(len(rows), -1)
    most = _INT8_MOST if packing.format == "int8" else _INT4_MOST
    width = rows.shape[1]
    group = min(packing.group or width, width)
    padded = F.pad(rows, (0, -width % group)).reshape(len(rows), -1, group)
    scales = padded.abs().amax(dim=-1) / most
    counted = padded / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    codes = counted.round().clamp(-most, most).to(torch.int8).reshape(len(rows), -1)
    codes = _in_pairs(codes) if packing.format == "int4" else codes[:, :width].contiguous()
    return Packed(packing, shape, {"weight_codes": codes, "weight_scales": scales})


def unpack_rows(packing: Packing, states: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The weight in fp32 as rows of outputs, `shape`."""
    if packing.format in _HALVES:
        half = states["weight_half"].float()
        return half.T if packing.across else half.reshape(shape)
    codes, scales = states["weight_codes"], states["weight_scales"]
    num_rows, width = shape
    if packing.format == "int4":
        codes = _from_pairs(codes)
    if scales.shape[1] == 1:
        return codes[:, :width].float() * scales
    group = packing.group
    padded = F.pad(codes, (0, scales.shape[1] * group - codes.shape[1]))
    grouped = padded.reshape(num_rows, -1, group).float() * scales[..., None]
    return grouped.reshape(num_rows, -1)[:, :width]


def state_shape(packing: Packing, shape: tuple[int, ...], state: str) -> tuple[int, ...]:
    """The shape of what stands for a weight of a shape."""
    if packing.format in _HALVES:
        return shape
    num_rows, width = _rows_shape(packing, shape)
    group = min(packing.group or width, width)
    num_groups = -(-width // group)
    if state == "weight_scales":
        return num_rows, num_groups
    return (
        (num_rows, width) if packing.format == "int8" else (num_rows, -(-num_groups * group // 2))
    )


def states_of(packing: Packing) -> tuple[str, ...]:
    """Names of what stands for a weight."""
    return ("weight_half",) if packing.format in _HALVES else ("weight_codes", "weight_scales")


def _rows_shape(packing: Packing, shape: tuple[int, ...]) -> tuple[int, int]:
    if packing.across:
        return shape[1], shape[0]
    width = 1
    for length in shape[1:]:
        width *= length
    return shape[0], width


def _in_pairs(codes: Tensor) -> Tensor:
    """Codes -8 … 7 two a byte, the first of a pair in the lower half; an odd row gets a 0 more."""
    codes = F.pad(codes, (0, codes.shape[1] % 2)) + 8
    low, high = codes[:, ::2].to(torch.uint8), codes[:, 1::2].to(torch.uint8)
    return low | (high << 4)


def _from_pairs(pairs: Tensor) -> Tensor:
    low, high = (pairs & 15).to(torch.int8) - 8, (pairs >> 4).to(torch.int8) - 8
    return torch.stack((low, high), dim=-1).reshape(len(pairs), -1)


# ---- layers --------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A matrix product whose weight is held as it is stored, and unpacked for each pass: it takes
    fewer bytes, and a little longer."""

    def __init__(self, packed: Packed, bias: Tensor | None) -> None:
        super().__init__()
        self.packing = packed.packing
        self.out_features, self.in_features = _rows_shape(packed.packing, packed.shape)
        for state, tensor in packed.states.items():
            self.register_buffer(f"stored_{state}", tensor, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weight in fp32, [outputs, inputs]; made anew each time."""
        states = {state: getattr(self, f"stored_{state}") for state in states_of(self.packing)}
        return unpack_rows(self.packing, states, (self.out_features, self.in_features))

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight.to(inputs.dtype), self.bias)


class Int8Linear(nn.Module):
    """A matrix product of int8 codes by torch's own kernel for CPUs (FBGEMM), which is about twice
    as fast as fp32: inputs become 8-bit codes by their own range at each pass (`dynamic`), or by
    one that was measured (`static`).

    The kernel's codes of inputs have 7 bits where the CPU lacks VNNI, whose sums of pairs would
    overflow 16 bits else. `engine`: of torch's; none: the best that this build has. Raises
    StoreError on a machine without one.
    """

    def __init__(self, packed: Packed, bias: Tensor | None, engine: str | None = None) -> None:
        super().__init__()
        self.packing = packed.packing
        self.out_features, self.in_features = _rows_shape(packed.packing, packed.shape)
        known = ("x86", "fbgemm", "qnnpack")
        engine = engine or next((name for name in known if name in _engines()), None)
        if engine is None:
            raise StoreError(
                f"weights as {packed.packing.format} with activations in int8",
                "this build of torch has no kernel for them",
                "they are computed by FBGEMM or QNNPACK",
                "compress the run by int8, whose activations stay as they are",
            )
        torch.backends.quantized.engine = engine
        scales = packed.states["weight_scales"].reshape(-1).double().clamp(min=1e-30)
        with warnings.catch_warnings():  # the kernel takes no other tensors
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            codes = torch._make_per_channel_quantized_tensor(
                packed.states["weight_codes"],
                scales,
                torch.zeros(len(scales), dtype=torch.int64),
                0,
            )
        self.kernel = torch.ops.quantized.linear_prepack(
            codes, None if bias is None else bias.detach().float()
        )
        self.num_bytes = packed.num_bytes + (0 if bias is None else 4 * bias.numel())
        """What it holds: the kernel's own memory is no tensor of torch's."""
        self.narrow = not _has_vnni()
        self.scale, self.zero = input_codes(packed.packing.low, packed.packing.high, self.narrow)

    @property
    def weight(self) -> Tensor:
        """The weight in fp32, [outputs, inputs]; made anew each time."""
        found: Tensor = torch.ops.quantized.linear_unpack(self.kernel)[0].dequantize()
        return found

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor
        if self.packing.activations == "dynamic":
            found = torch.ops.quantized.linear_dynamic(inputs.float(), self.kernel, self.narrow)
        else:
            found = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
                inputs.float(), self.scale, self.zero, self.kernel
            )
        return found.to(inputs.dtype)


class PackedEmbedding(nn.Module):
    """A table whose rows are held as they are stored; those that are looked up are unpacked."""

    def __init__(self, packed: Packed, padding_idx: int | None) -> None:
        super().__init__()
        self.packing, self.shape, self.padding_idx = packed.packing, packed.shape, padding_idx
        self.num_embeddings, self.embedding_dim = packed.shape
        for state, tensor in packed.states.items():
            self.register_buffer(f"stored_{state}", tensor, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The table in fp32; made anew each time."""
        states = {state: getattr(self, f"stored_{state}") for state in states_of(self.packing)}
        return unpack_rows(self.packing, states, self.shape)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.flatten()
        states = {
            state: getattr(self, f"stored_{state}")[flat] for state in states_of(self.packing)
        }
        rows = unpack_rows(self.packing, states, (len(flat), self.embedding_dim))
        return rows.reshape(*ids.shape, self.embedding_dim)


def input_codes(low: float, high: float, narrow: bool) -> tuple[float, int]:
    """(scale, code of zero) of inputs that lie between `low` and `high`, in 7 bits where `narrow`,
    else in 8."""
    low, high, most = min(low, 0.0), max(high, 0.0), 127 if narrow else 255
    scale = (high - low) / most or 1.0
    return scale, round(-low / scale)


def _engines() -> list[str]:
    return list(torch.backends.quantized.supported_engines)


def _has_vnni() -> bool:
    probe = getattr(torch.cpu, "_is_vnni_supported", None) or getattr(
        torch.cpu, "_is_avx512_vnni_supported", None
    )
    return bool(probe and probe())


def matrices(model: Any) -> dict[str, nn.Module]:
    """What of a model may be packed, by the name of its weight: matrices of products and tables
    that are looked up, each once."""
    from transformers.pytorch_utils import Conv1D

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) and id(module.weight) in names:
            found.setdefault(names[id(module.weight)], module)
    return found


def pack_model(model: Any, packing: Packing, only: set[str] | None = None) -> dict[str, Packed]:
    """Every matrix and table of a model in a format, by the name of the weight; `only` some.

    Activations become codes before products alone, and never before a head over a vocabulary,
    whose logits tasks take a chunk at a time from its weight.
    """
    from transformers.pytorch_utils import Conv1D

    whole = _held_whole(model)
    found = {}
    for name, module in matrices(model).items():
        if only is not None and name not in only:
            continue
        own = replace(packing, across=isinstance(module, Conv1D))
        if isinstance(module, nn.Embedding) or id(module.weight) in whole:
            own = replace(own, activations="fp32", low=0.0, high=0.0)
        found[name] = pack(module.weight, own)  # type: ignore[arg-type]
    return found


def _held_whole(model: Any) -> set[int]:
    """Ids of weights that layers hold unpacked: the head over a vocabulary, whose product tasks
    take a chunk at a time, and the table that it is tied to."""
    head = model.get_output_embeddings()
    return set() if head is None else {id(head.weight)}


@torch.no_grad()
def install(model: Any, packed: Mapping[str, Packed]) -> Any:
    """Put layers into a model that hold packed weights as they are; returns the model. What no
    layer can hold, such as a head over a vocabulary, has the values in fp32."""
    from transformers.pytorch_utils import Conv1D

    whole = _held_whole(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places = dict(model.named_modules(remove_duplicate=False))
    for place, module in places.items():
        name = names.get(id(getattr(module, "weight", None)))
        if name is None or name not in packed:
            continue
        one = packed[name]
        if id(module.weight) in whole or type(module) not in (nn.Linear, Conv1D, nn.Embedding):
            module.weight.copy_(one.unpacked())
            continue
        owner, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(owner), leaf, _layer(module, one))
    model.requires_grad_(False)
    if any(isinstance(module, Int8Linear) for module in model.modules()):
        model.dray_on_cpu = True
    return model


def _layer(module: Any, packed: Packed) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return PackedEmbedding(packed, module.padding_idx)
    kind = PackedLinear if packed.packing.activations == "fp32" else Int8Linear
    return kind(packed, module.bias)


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model in memory: its parameters and buffers, each once, and what kernels hold."""
    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    kernels = (module for module in model.modules() if isinstance(module, Int8Linear))
    return sum(seen.values()) + sum(module.num_bytes for module in kernels)
