"""Adapters in a model: the one door to the peft library.

`adapt` puts trained parts into a transformers model, whose class and names stay what they are, and
marks all else as its base (`freezing.py`). `merge` makes them a part of the weights that they
change, `as_peft` says them in peft's own format. LoRA and its variants and IA3 are peft's layers;
prefix and prompt are its encoders, put before a row by the model's body, so that a task sees no
virtual tokens; bottlenecks are a module of dray's, since peft has none.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dray.errors import SpecError, first_line, translated
from dray.models.config import longest_row
from dray.models.freezing import is_base, is_in_body, keep_as_base
from dray.models.groups import find_blocks
from dray.models.initialize import Gathering, no_gathering
from dray.processes.imports import first_import
from dray.spec import Adapters, Spec

_NAME = "default"
"""What peft calls a model's adapters where there is one set of them; it stands in their names."""
_OUTPUTS = (
    *("self_attn.o_proj", "mlp.down_proj", "attention.output.dense", "output.dense"),
    *("attn.c_proj", "mlp.c_proj", "attention.dense", "mlp.dense_4h_to_h", "attention.out_lin"),
    *("ffn.lin2", "attn.Wo", "mlp.Wo", "self_attn.out_proj", "fc2"),
)
"""Ends of the names of the matrices that attention and feed-forward end with."""
_TASK_TYPES = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
}
"""What peft calls the heads of transformers' classes."""


@dataclass(frozen=True)
class Adapted:
    """What `adapt` has done to a model: it stands in the model's `dray_adapted`."""

    adapters: Adapters
    config: Any
    """As peft has it; None where it has nothing like it."""


def adapt(
    model: Any, spec: Spec, *, gathering: Gathering = no_gathering, unpacked: bool = False
) -> Any:
    """Put the adapters that a spec names into its model and leave nothing else trained but a new
    head; returns the model.

    Their initial weights are drawn from the seed, alike on all ranks; a model on the meta device
    gets some without values. `unpacked`: what the spec holds in fewer bits has the values that it
    has there, but is held as ever. Raises SpecError for what the architecture has not.
    """
    adapters = spec.adapters
    if adapters is None:
        raise ValueError("the spec has no adapters")
    config = _make_config(model, adapters, _TASK_TYPES.get(spec.task.head.auto_class))
    if adapters.quantized:
        pack(model, set(config.target_modules), spec.precision)
        if unpacked:
            unpack(model)
    leave_only_head(model, spec)
    before = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    digest = hashlib.sha256(f"{spec.seed}:adapters".encode()).digest()
    with torch.random.fork_rng(devices=[]), _gathered_by(gathering):
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        _put_in(model, adapters, config, spec.data.sequence_tokens)
    for parameter in model.parameters():  # of which peft has its own opinion
        parameter.requires_grad_(not is_base(parameter))
    if config is not None and any(before.values()):
        config.modules_to_save = sorted(set(_head_modules(model, before)))
    model.dray_adapted = Adapted(adapters, config)
    return model


def leave_only_head(model: Any, spec: Spec) -> None:
    """Mark all of a model as its base but a head that the spec's task has anew: that of classes or
    numbers, not that of a vocabulary."""
    is_new = spec.task.head.over == "labels"
    keep_as_base(
        parameter
        for name, parameter in model.named_parameters()
        if not is_new or is_in_body(model, name)
    )


def merge(model: Any) -> Any:
    """Make the adapters a part of the weights that they change, and take them out; returns the
    model. Raises SpecError for a kind that is no change of weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters = model.dray_adapted.adapters
    if not adapters.merges:
        raise SpecError(
            f"adapters.name = {adapters.name}",
            "cannot be merged",
            "they change what goes through a model, not its weights",
            "write them alone: --adapters",
        )
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, module.get_base_layer())
    for left in ("dray_adapted", "peft_config"):
        if hasattr(model, left):
            delattr(model, left)
    return model


def as_peft(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json, adapter_model.safetensors) of a model's adapters and trained head, as
    peft's `PeftModel.from_pretrained` reads them. Raises SpecError for a kind that peft has not."""
    adapted: Adapted = model.dray_adapted
    if adapted.config is None:
        raise SpecError(
            f"adapters.name = {adapted.adapters.name}",
            "peft has no such adapters",
            "what is written is for peft's own loading",
            "keep the run: `dray evaluate`, `predict` and `generate` read it",
        )
    tree = adapted.config.to_dict()
    plain = {
        name: sorted(value) if isinstance(value, (set, frozenset)) else value
        for name, value in tree.items()
    }
    plain["inference_mode"] = True
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if is_base(parameter):
            continue
        if ".virtual_tokens." in name:
            state["prompt_embeddings"] = parameter.detach()
            continue
        key = name.replace(f".{_NAME}", "")
        if "lora_magnitude_vector" in key:
            key = key.removesuffix(".weight")
        state[f"base_model.model.{key}"] = parameter.detach()
    return plain, state


# ---- what peft is told -------------------------------------------------------------------------


def _peft() -> Any:
    """The library. It imports bitsandbytes where that is installed, which tells of every kernel
    that it might have had."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with first_import("peft", without=("scipy", "sklearn")):
        return import_module("peft")


def _make_config(model: Any, adapters: Any, task_type: str | None) -> Any:
    """peft's configuration of the adapters. Raises SpecError for targets that no module has, and
    for an architecture that cannot have them."""
    if adapters.name == "bottleneck":
        return None
    peft = _peft()
    if adapters.name in ("lora", "dora", "rslora"):
        return peft.LoraConfig(
            r=adapters.rank,
            lora_alpha=adapters.scale_numerator,
            lora_dropout=adapters.dropout,
            target_modules=_find_targets(model, adapters.targets, _all_matrices(model)),
            use_dora=adapters.name == "dora",
            use_rslora=adapters.name == "rslora",
            task_type=task_type,
            bias="none",
        )
    if adapters.name == "ia3":
        return _ia3_config(peft, model, adapters, task_type)
    settings = {
        "num_virtual_tokens": adapters.num_tokens,
        "task_type": task_type,
        "num_transformer_submodules": 1,
    }
    if adapters.name == "prefix":
        _check_takes_prefix(model)
        config = peft.PrefixTuningConfig(**settings)
    else:
        config = peft.PromptTuningConfig(**settings, prompt_tuning_init="SAMPLE_VOCAB")
    text = model.config.get_text_config()
    from peft.utils import _prepare_prompt_learning_config

    prepared = _prepare_prompt_learning_config(config, text.to_dict())
    if adapters.name == "prefix":  # heads may be wider than their share of the residual stream
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        prepared.token_dim = width * prepared.num_attention_heads
    return prepared


def _ia3_config(peft: Any, model: Any, adapters: Any, task_type: str | None) -> Any:
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as INPUTS,
    )
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    kind = model.config.model_type
    targets, inputs = adapters.targets, adapters.inputs or ()
    if targets is None:
        if kind not in TARGETS:
            raise SpecError(
                "adapters.targets",
                f"peft has no choice of its own for {kind}",
                "ia3 scales keys, values and what goes into a feed-forward",
                f"name them, of {', '.join(_names_of(_all_matrices(model)))}",
            )
        targets, inputs = tuple(TARGETS[kind]), tuple(INPUTS.get(kind, ()))
    return peft.IA3Config(
        target_modules=_find_targets(model, targets, _all_matrices(model)),
        feedforward_modules=list(inputs),
        task_type=task_type,
    )


def _all_matrices(model: Any) -> list[str]:
    """Names of the modules of a model's blocks that are a matrix each."""
    inside = {id(inner) for block in find_blocks(model) for inner in block.modules()}
    return [
        name
        for name, module in model.named_modules()
        if id(module) in inside and _is_matrix(module)
    ]


def _is_matrix(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def _find_targets(model: Any, wanted: tuple[str, ...] | None, found: list[str]) -> list[str]:
    """The ends of names that mean the modules to change: the spec's, each of which a matrix must
    have; none: those of all `found`. Raises SpecError."""
    if not found:
        raise SpecError(
            "adapters",
            f"{type(model).__name__} has no matrices in blocks that transformers knows",
            "adapters lie beside those",
            "leave adapters out",
        )
    matrices = [name for name, module in model.named_modules() if _is_matrix(module)]
    if wanted is None:
        names = _names_of(found)
        meant = {name for name in matrices if name.rpartition(".")[2] in names}
        return names if meant == set(found) else found
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in matrices):
            raise SpecError(
                f"adapters.targets: {target}",
                f"no matrix of {type(model).__name__} is called so",
                "a target is the end of a matrix' name",
                f"e.g. {', '.join(_names_of(found))}",
            )
    return list(wanted)


def _names_of(modules: Iterable[str]) -> list[str]:
    """The last words of modules' names, each once."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in modules))


def _head_modules(model: Any, before: dict[int, bool]) -> Iterator[str]:
    """Names, as peft's `modules_to_save` has them, of the modules of a trained head."""
    body = model.base_model
    for owner in (model, body):
        for name, module in owner.named_children():
            if module is not body and any(before.get(id(p)) for p in module.parameters()):
                yield name


# ---- into the model ----------------------------------------------------------------------------


def _put_in(model: Any, adapters: Any, config: Any, row_tokens: int) -> None:
    if adapters.virtual_tokens:
        _put_before_rows(model, adapters, config, row_tokens)
    elif config is None:
        _put_bottlenecks(model, adapters)
    else:
        with (
            translated(lambda error: SpecError("adapters", first_line(error))),
            warnings.catch_warnings(),
        ):
            # It asks a model by a name that transformers is about to change.
            warnings.simplefilter("ignore", FutureWarning)
            _peft().inject_adapter_in_model(config, model, adapter_name=_NAME)


def _put_bottlenecks(model: Any, adapters: Any) -> None:
    found = _all_matrices(model)
    usual = [name for name in found if name.endswith(tuple(f".{end}" for end in _OUTPUTS))]
    if adapters.targets is None and not usual:
        raise SpecError(
            "adapters.targets",
            f"where attention and feed-forward of {type(model).__name__} end is not known",
            "a bottleneck is put behind each",
            f"name them, of {', '.join(_names_of(found))}",
        )
    targets = _find_targets(model, adapters.targets, found)
    ends = tuple(f".{target}" for target in targets)
    chosen = usual if adapters.targets is None else [n for n in found if f".{n}".endswith(ends)]
    for name in chosen:
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        setattr(owner, leaf, BottleneckLayer(getattr(owner, leaf), adapters.width))


class BottleneckLayer(nn.Module):
    """A matrix, and what it gives out through a narrow feed-forward with a residual around it. It
    begins as no change."""

    def __init__(self, base_layer: Any, width: int) -> None:
        super().__init__()
        size = getattr(base_layer, "out_features", None) or base_layer.nf
        self.base_layer = base_layer
        self.adapter_down, self.adapter_up = nn.Linear(size, width), nn.Linear(width, size)
        for parameter in self.adapter_up.parameters():
            nn.init.zeros_(parameter)
        for module in (self.adapter_down, self.adapter_up):
            module.to(base_layer.weight.device, base_layer.weight.dtype)

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """As the matrix takes them; [..., size]."""
        hidden: Tensor = self.base_layer(*inputs, **named)
        added: Tensor = self.adapter_up(F.gelu(self.adapter_down(hidden)))
        return hidden + added


def used_besides(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Modules with a parameter of another one that they use, which ZeRO 3 must know of: DoRA's
    magnitudes look at the matrix that they belong to."""
    module: Any
    for module in model.modules():
        for vector in getattr(module, "lora_magnitude_vector", {}).values():
            yield vector, module.get_base_layer().weight


@contextmanager
def _gathered_by(gathering: Gathering) -> Iterator[None]:
    """Within this, peft makes partitioned parameters whole our way: by itself it would only if
    transformers had been told of ZeRO 3."""
    with ExitStack() as patched:
        if gathering is not no_gathering:
            _peft()
            from peft.tuners.lora import dora
            from peft.tuners.prompt_tuning import model as prompts

            def gather(parameters: Any, *_: Any, **__: Any) -> Any:
                one = isinstance(parameters, nn.Parameter)
                return gathering([parameters] if one else list(parameters))

            for module in (dora, prompts):
                patched.callback(setattr, module, "gather_params_ctx", module.gather_params_ctx)
                module.gather_params_ctx = gather
        yield


# ---- virtual tokens ----------------------------------------------------------------------------


def _check_takes_prefix(model: Any) -> None:
    """Raise SpecError for an architecture that keeps no keys and values of earlier tokens."""
    from transformers import AutoModelForMaskedLM

    body = model.base_model
    takes = "past_key_values" in inspect.signature(type(body).forward).parameters
    encodes = model.config.model_type in AutoModelForMaskedLM._model_mapping._model_mapping
    if not takes or encodes or body is model:
        raise SpecError(
            "adapters.name = prefix",
            f"{model.config.model_type} keeps no keys and values of earlier tokens",
            "a prefix is such keys and values",
            "give adapters.name=prompt, or lora",
        )


def _put_before_rows(model: Any, adapters: Any, config: Any, row_tokens: int) -> None:
    """Let the model's body put virtual tokens before each row, and take away what it gives out for
    them. Raises SpecError where a row has no place for them."""
    body, longest = model.base_model, longest_row(model.config)
    if longest is not None and row_tokens + adapters.num_tokens > longest:
        raise SpecError(
            f"data.sequence_tokens = {row_tokens}",
            f"with adapters.num_tokens = {adapters.num_tokens} before it a row has "
            f"{row_tokens + adapters.num_tokens} tokens, and the model takes {longest}",
            "virtual tokens have places, too",
            f"give data.sequence_tokens={longest - adapters.num_tokens} or less"
            if longest > adapters.num_tokens
            else "give fewer adapters.num_tokens",
        )
    if body is model or model.config.is_encoder_decoder:
        what = "has no body beside its head" if body is model else "reads and writes apart"
        raise SpecError(
            f"adapters.name = {adapters.name}",
            f"{type(model).__name__} {what}",
            "virtual tokens go before what one body reads",
            "give adapters.name=lora",
        )
    from peft.tuners.prefix_tuning import PrefixEncoder
    from peft.tuners.prompt_tuning import PromptEmbedding

    is_prefix = adapters.name == "prefix"
    encoder = (
        PrefixEncoder(config) if is_prefix else PromptEmbedding(config, body.get_input_embeddings())
    )
    device = next(body.parameters()).device
    body.virtual_tokens = encoder.to(device)
    body.virtual_shape = (
        config.num_virtual_tokens,
        config.num_layers,
        config.num_attention_heads,
        config.token_dim // config.num_attention_heads,
    )
    kind = type(body)
    # A class of its own, and no hook or replaced method: who puts an answer in the place of the
    # body's forward pass (`tasks/parts/heads.py`) gets that, and what is under it back.
    mixin = _WithPrefix if is_prefix else _WithPrompt
    body.__class__ = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})


class _WithVirtualTokens:
    """A model's body that reads virtual tokens before each row."""

    virtual_tokens: Any
    virtual_shape: tuple[int, int, int, int]

    def _encoded(self, num_rows: int) -> Tensor:
        """What the virtual tokens are, [rows, tokens, …]."""
        weight = self.virtual_tokens.embedding.weight
        ids = torch.arange(self.virtual_shape[0], device=weight.device).expand(num_rows, -1)
        encoded: Tensor = self.virtual_tokens(ids)
        return encoded

    def _seen(self, mask: Tensor | None, value: int = 1) -> Tensor | None:
        """A mask [rows, tokens] with the virtual tokens before it."""
        if mask is None:
            return None
        return F.pad(mask, (self.virtual_shape[0], 0), value=value)


class _WithPrompt(_WithVirtualTokens):
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        **named: Any,
    ) -> Any:
        """As the body's own; rows come out as long as they went in."""
        forward = super().forward  # type: ignore[misc]
        named = {name: value for name, value in named.items() if name not in _PLACES}
        mask = self._seen(attention_mask)
        if past_key_values is not None and past_key_values.get_seq_length():
            return forward(input_ids, attention_mask=mask, past_key_values=past_key_values, **named)
        given = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds  # type: ignore[attr-defined]
        prompt = self._encoded(len(given)).to(given.dtype)
        if named.get("token_type_ids") is not None:
            named["token_type_ids"] = self._seen(named["token_type_ids"], value=0)
        if past_key_values is not None:
            named["past_key_values"] = past_key_values
        output = forward(
            inputs_embeds=torch.cat((prompt, given), dim=1), attention_mask=mask, **named
        )
        rest = output[0][:, self.virtual_shape[0] :]
        if isinstance(output, tuple):
            return (rest, *output[1:])
        output["last_hidden_state"] = rest
        return output


class _WithPrefix(_WithVirtualTokens):
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        **named: Any,
    ) -> Any:
        """As the body's own: the keys and values are what it has read already."""
        from transformers import DynamicCache

        cache = DynamicCache() if past_key_values is None else past_key_values
        if not cache.get_seq_length():
            given = input_ids if inputs_embeds is None else inputs_embeds
            tokens, layers, heads, width = self.virtual_shape
            assert given is not None
            encoded = self._encoded(len(given)).to(self.dtype)  # type: ignore[attr-defined]
            states = encoded.view(len(given), tokens, 2 * layers, heads, width)
            by_layer = states.permute(2, 0, 3, 1, 4)
            for layer in range(layers):
                cache.update(by_layer[2 * layer], by_layer[2 * layer + 1], layer)
        named = {name: value for name, value in named.items() if name not in _PLACES}
        return super().forward(  # type: ignore[misc]
            input_ids,
            attention_mask=self._seen(attention_mask),
            inputs_embeds=inputs_embeds,
            past_key_values=cache,
            **named,
        )


_PLACES = ("position_ids", "cache_position")
"""Where tokens stand, as those count who know nothing of the virtual ones: the body counts anew."""


# ---- a base in fewer bits ----------------------------------------------------------------------


def packed_parameters(model: Any) -> set[int]:
    """Ids of the matrices that a model with adapters holds in 4 bits, or would if it were not on
    the meta device."""
    adapted: Adapted | None = getattr(model, "dray_adapted", None)
    if adapted is None or not adapted.adapters.quantized:
        return set()
    return {id(module.base_layer.weight) for module in model.modules() if hasattr(module, "lora_A")}


def pack(model: Any, targets: set[str], precision: str) -> None:
    """Hold the matrices that are targets in 4 bits, as bitsandbytes has them (nf4; Dettmers et al.
    2023, arXiv 2305.14314); none of a model on the meta device, where nothing is held."""
    ends = tuple(f".{target}" for target in targets)
    if next(model.parameters()).device.type == "meta":
        return
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f".{name}".endswith(ends):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, _packed(module, precision))
    model.is_loaded_in_4bit = True  # as peft asks


def _packed(module: nn.Linear, precision: str) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = module.weight.data
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    packed = Linear4bit(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        compute_dtype=compute,
        quant_type="nf4",
        device="meta",
    )
    # From what the passes would use, so that an evaluation in fp32 packs the same.
    packed.weight = Params4bit(
        weight.to(compute).float().cpu(), requires_grad=False, quant_type="nf4"
    ).to(weight.device)
    packed.bias = module.bias
    # A validation would put the bits into another order.
    packed.support_avx512bf16_for_cpu = False
    return packed


def unpack(model: Any) -> None:
    """Give matrices that `pack` has packed back as they are computed with, in fp32."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            values = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.weight = nn.Parameter(values.float(), requires_grad=False)
            plain.bias = module.bias
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, plain)
    model.is_loaded_in_4bit = False
