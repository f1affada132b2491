"""A model's sizes, counted on the architecture itself: transformers builds it on the meta device,
where it takes no memory, and its tensors are read off.

Imports neither torch nor transformers: a process of its own does, some seconds long, and the user's
cache remembers what it found by all that the configuration is made from. A configuration that was
counted once is planned at once. Where nothing can be counted the caller is told why, and the plan
goes by formulas (`dray.plan.parameters`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from dray.errors import DrayError, SpecError, one_line, translated
from dray.models.config import INTERMEDIATE_NAMES, NUM_EXPERTS, make_config
from dray.plan import Counted, ParameterCount, Plan, Shape, load_config, load_dimensions, make_plan
from dray.plan.architectures import OFFSET_POSITIONS
from dray.spec import Head, Spec, make_spec
from dray.storage.cache import recall, remember

if TYPE_CHECKING:
    from torch import nn

CACHED = "counts"
VERSION = 4
"""Of what is counted and how: another one counts anew."""
LIMIT_SECONDS = 180.0
_LIBRARIES = ("torch", "transformers")
_OF_PARTS = ("adapters", "freezing", "task")
"""Sections that name parts of a model: one that it does not have is a mistake, and no model that
cannot be counted."""
_CHOSEN_EXPERTS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
)
_ATTENDS = ("attention", "hybrid")
"""Words of the kinds of blocks that attend; linear attention does not."""


def make_counted_plan(spec: Spec, shape: Shape, **known: Any) -> Plan:
    """`make_plan` with the model counted, where no formula is known to be exact. `known`: what
    `make_plan` takes."""
    if "counted" in known:
        return make_plan(spec, shape, **known)
    names = ("vocab_size", "num_labels", "pad_token_id", "config")
    found = find_counts(spec, **{name: known[name] for name in names if name in known})
    if isinstance(found, Counted):
        return make_plan(spec, shape, counted=found, **known)
    return make_plan(spec, shape, why_not_counted=found, **known)


@dataclass(frozen=True)
class _Asked:
    """All that a configuration is made from."""

    spec: Spec
    vocab_size: int
    num_labels: int
    pad_token_id: int | None
    config: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "spec": self.spec.model_dump(mode="json")}

    def key(self) -> dict[str, Any]:
        """What the counts depend on, the libraries included. Raises PackageNotFoundError without
        them."""
        return {
            "version": VERSION,
            "libraries": {name: metadata.version(name) for name in _LIBRARIES},
            "model": self.spec.model.model_dump(mode="json", exclude={"path", "run", "step"}),
            **self.spec.model_dump(mode="json", include={"adapters", "freezing"}),
            "head": asdict(self.spec.task.head),
            "sequence_tokens": self.spec.data.sequence_tokens,
            "vocab_size": self.vocab_size,
            "num_labels": self.num_labels,
            "pad_token_id": self.pad_token_id,
            "config": self.config,
            "task": repr(self._task()) if _is_measured(self.spec) else None,
        }

    def _task(self) -> list[Any]:
        """What decides over the rows that a model without tokens is measured by."""
        task = self.spec.task
        return [task.name, task.settings.model_dump(mode="json"), dict(task.model_options)]


def find_counts(
    spec: Spec,
    *,
    vocab_size: int | None = None,
    num_labels: int | None = None,
    pad_token_id: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Counted | str:
    """The counts of the spec's model; a text: why there are none, empty where the formulas are
    exact.

    The arguments are those of `load_dimensions`. Takes some seconds and another process where
    nothing is remembered, unless torch is here already. Raises SpecError for a folder that cannot
    be read, and for parts of a model that are to be trained or read and that it does not have.
    """
    if spec.model.origin:
        config = config or load_config(str(spec.model.path))
    sizes = None
    if config is None:
        sizes = load_dimensions(spec, vocab_size, num_labels, None, pad_token_id)
        if sizes.exact and spec.task.tokenizes and not spec.trains_part:
            return ""
    asked = _Asked(
        spec,
        vocab_size=sizes.vocab if sizes else vocab_size or 0,
        num_labels=spec.task.num_outputs or spec.model.num_labels or num_labels or 2,
        pad_token_id=pad_token_id if spec.model.architecture in OFFSET_POSITIONS else None,
        config=config,
    )
    try:
        key = asked.key()
    except metadata.PackageNotFoundError as error:
        return f"{error.name} is not installed here"
    kept = recall(CACHED, key)
    if kept is None:
        loaded = all(name in sys.modules for name in _LIBRARIES)
        kept = _answer(asked) if loaded else _ask_process(asked)
        if isinstance(kept, str):
            return kept
        remember(CACHED, key, kept)
    if "mistake" in kept:
        raise SpecError(*kept["mistake"])
    return Counted.model_validate(kept["counted"]) if "counted" in kept else str(kept["problem"])


def _is_measured(spec: Spec) -> bool:
    """Whether a row's cost is measured on the model, since no formula has it."""
    return bool(not spec.task.tokenizes or spec.task.adds)


def _ask_process(asked: _Asked) -> dict[str, Any] | str:
    """What a process of its own answers; a text: what became of it instead."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", __name__],
            input=json.dumps(asked.to_json()),
            capture_output=True,
            text=True,
            env=environment,
            timeout=LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"counting took more than {LIMIT_SECONDS:g} s"
    except OSError as error:
        return f"counting could not be started ({error.strerror})"
    try:
        return dict(json.loads(done.stdout.strip().rpartition("\n")[2]))
    except ValueError:
        last = done.stderr.strip().rpartition("\n")[2][:200]
        return f"counting ended with {done.returncode} ({last or 'without a word'})"


def _answer(asked: _Asked) -> dict[str, Any]:
    """What was counted, the mistake of the spec's or the problem, as plain values."""
    try:
        found = count_model(
            asked.spec,
            vocab_size=asked.vocab_size,
            num_labels=asked.num_labels,
            pad_token_id=asked.pad_token_id,
            config=asked.config,
        )
        return {"counted": found.model_dump(mode="json")}
    except DrayError as error:
        if isinstance(error, SpecError) and re.match(rf"({'|'.join(_OF_PARTS)})\b", error.where):
            return {"mistake": [error.where, error.what, error.rule, error.way_out]}
        return {"problem": one_line(error)}


def main() -> None:
    """Answer what is asked on the standard input."""
    asked = json.load(sys.stdin)
    spec = make_spec(asked.pop("spec"), kept=True)
    print(json.dumps(_answer(_Asked(spec=spec, **asked))))


# ---- the model itself --------------------------------------------------------------------------


def count_model(
    spec: Spec,
    *,
    vocab_size: int,
    num_labels: int = 2,
    pad_token_id: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Counted:
    """Build the spec's model on the meta device and count it, here and now. `config`: the folder's.
    Raises SpecError where it cannot be built."""
    from dray.models.build import (
        check_builds,
        check_trains,
        import_transformers,
        one_document_a_row,
    )
    from dray.models.row_cost import ROWS, measure_added, measure_row

    import_transformers()
    made = make_config(
        spec,
        vocab_size=vocab_size,
        num_labels=num_labels,
        pad_token_id=pad_token_id,
        kept=config,
    )
    model = check_builds(spec, made)
    check_trains(model, spec)
    with translated(
        lambda error: SpecError(
            "model", f"{made.model_type} has sizes that are not understood ({one_line(error)})"
        )
    ):
        found = _read_sizes(model, made, spec.task.head)
        if not _is_measured(spec):
            return found
        inputs = spec.task.model_inputs(ROWS, spec.row_tokens)
        if spec.task.adds:
            with one_document_a_row():
                row = measure_added(spec.task.objective(model), inputs, spec.row_tokens)
            return found.model_copy(update={"row": row})
        if model.main_input_name not in inputs:
            raise SpecError(
                "model",
                f"{made.model_type} takes {model.main_input_name}",
                f"{spec.task.name} gives {', '.join(inputs)}",
                "name another architecture, or change the task's settings",
            )
        return found.model_copy(update={"row": measure_row(model, inputs, spec.row_tokens)})


def _read_sizes(model: Any, config: Any, head: Head) -> Counted:
    from transformers import AutoModelForMaskedLM

    text = config.get_text_config()
    heads = _number(text, "num_attention_heads", "n_head", "num_heads")
    hidden = _number(text, "hidden_size", "d_model", "n_embd")
    encodes = config.model_type in AutoModelForMaskedLM._model_mapping._model_mapping
    head_dim = _number(text, "head_dim") or hidden // max(1, heads)
    if across := _number(text, "qk_nope_head_dim"):  # queries and keys are wider than values
        across += _number(text, "qk_rope_head_dim")
        head_dim = (across + (_number(text, "v_head_dim") or across)) // 2
    return Counted(
        count=_count(model, text, head),
        hidden=hidden,
        layers=_num_layers(text),
        heads=heads,
        kv_heads=_kv_heads(text, heads),
        head_dim=head_dim,
        intermediate=_feed_forward_width(text, hidden),
        vocab=_number(text, "vocab_size"),
        causal=not head.looks_ahead or (head.over != "vocabulary" and not encodes),
        attention=_attention(text, heads),
    )


def _num_layers(config: Any) -> int:
    """Of an encoder and a decoder the blocks of both."""
    own = _number(config, "num_hidden_layers", "n_layer", "num_layers")
    if not getattr(config, "is_encoder_decoder", False):
        return own
    return own + _number(config, "decoder_layers", "num_decoder_layers")


def _kv_heads(config: Any, heads: int) -> int:
    """GPT BigCode and the first Falcons share one head of keys and values unless told otherwise."""
    if getattr(config, "multi_query", False):
        return 1 if not getattr(config, "new_decoder_architecture", False) else heads
    return _number(config, "num_key_value_heads", "num_kv_heads") or heads


def _number(config: Any, *names: str) -> int:
    """The first of the fields that is there; of one for each block, the greatest. 0: none."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)) and value:
            value = max((item for item in value if isinstance(item, int)), default=None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 0


def _feed_forward_width(config: Any, hidden: int) -> int:
    """Of the feed-forward that a token goes through: its experts', where it has some."""
    width = _number(config, *INTERMEDIATE_NAMES) or 4 * hidden
    chosen = _number(config, *_CHOSEN_EXPERTS)
    if not (_number(config, *NUM_EXPERTS) and chosen):
        return width
    each = _number(config, "moe_intermediate_size", "expert_ffn_hidden_size") or width
    shared = _number(config, "n_shared_experts", "num_shared_experts") * each
    return chosen * each + (shared or _number(config, "shared_expert_intermediate_size"))


def _attention(config: Any, heads: int) -> tuple[tuple[int, int], ...]:
    """Blocks that attend by the tokens that each of theirs sees at most; 0: a whole row."""
    if not heads:
        return ()
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    near = _number(config, "local_attention")
    near = near + 1 if near else _number(config, "sliding_window")
    if not kinds:
        return ((_num_layers(config), near),)
    widths: dict[int, int] = {}
    for kind in kinds:
        if "linear" in kind or not any(word in kind for word in _ATTENDS):
            continue
        width = near if "sliding" in kind else 0
        width = _number(config, "attention_chunk_size") if "chunked" in kind else width
        widths[width] = widths.get(width, 0) + 1
    return tuple((number, width) for width, number in sorted(widths.items()))


@dataclass(frozen=True)
class _Owned:
    """A parameter, and where it was found first."""

    name: str
    module: nn.Module
    module_name: str
    parameter: nn.Parameter

    @property
    def size(self) -> int:
        return self.parameter.numel()

    @property
    def is_looked_up(self) -> bool:
        """Whether it is a table: of tokens, positions, types."""
        from torch import nn

        return isinstance(self.module, nn.Embedding) or "Embedding" in type(self.module).__name__


def _count(model: Any, config: Any, head: Head) -> ParameterCount:
    from dray.models.adapters import packed_parameters
    from dray.models.freezing import is_base
    from dray.models.groups import find_blocks

    packed = packed_parameters(model)
    owned = list(_owned(model))
    total = sum(one.size for one in owned)
    tables = sum(one.size for one in owned if one.is_looked_up)
    num_head, num_own_head = _head(model, owned, head)
    body = total - tables - num_own_head
    base = [one for one in owned if is_base(one.parameter)]
    blocks = [
        sum(parameter.numel() for parameter in block.parameters())
        for block in find_blocks(model) or _listed(model)
    ]
    return ParameterCount(
        total=total,
        embedding=tables,
        head=num_head,
        layer=max(blocks, default=body),
        largest=max((one.size for one in owned), default=0),
        body=body,
        active=body + sum(_surplus(model, owned, config)),
        base=sum(one.size for one in base),
        packed=sum(one.size for one in base if id(one.parameter) in packed),
    )


def _listed(model: Any) -> list[nn.Module]:
    """What a model holds in lists: blocks, where they are not marked as such."""
    from torch import nn

    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return [block for blocks in lists for block in blocks]


def _owned(model: Any) -> Iterator[_Owned]:
    """Every parameter once; one that a table shares belongs to that."""
    from torch import nn

    seen: set[int] = set()
    modules = sorted(model.named_modules(), key=lambda pair: not isinstance(pair[1], nn.Embedding))
    for module_name, module in modules:
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                whole = f"{module_name}.{name}" if module_name else name
                yield _Owned(whole, module, module_name, parameter)


def _head(model: Any, owned: list[_Owned], head: Head) -> tuple[int, int]:
    """(parameters that the head multiplies, those of them that are no table's)"""
    if head.over == "vocabulary":
        projection = getattr(model.get_output_embeddings(), "weight", None)
        if projection is None:
            return 0, 0
        is_own = any(one.parameter is projection and not one.is_looked_up for one in owned)
        return projection.numel(), projection.numel() if is_own else 0
    if head.over == "hidden":
        return 0, 0
    body = f"{model.base_model_prefix}."
    found = sum(
        one.size
        for one in owned
        if one.parameter.dim() > 1
        and not one.is_looked_up
        and (not one.name.startswith(body) or "pooler" in one.name)
    )
    return found, found


def _surplus(model: Any, owned: list[_Owned], config: Any) -> Iterator[int]:
    """What a token goes through more often than once, less what of a mixture it does not go
    through."""
    experts, chosen = _number(config, *NUM_EXPERTS), _number(config, *_CHOSEN_EXPERTS)
    calls = _num_calls(model)
    for one in owned:
        if one.is_looked_up:
            continue
        if experts and chosen and _is_expert(one, experts):
            yield one.size * chosen // experts - one.size
        else:
            yield one.size * (max(1, calls.get(one.module_name, 1)) - 1)


def _is_expert(one: _Owned, experts: int) -> bool:
    """Whether a parameter is an expert's, or all experts' in one."""
    if "experts" in one.name.split("."):
        return True
    stacked = one.parameter.dim() > 2 and one.parameter.shape[0] == experts
    return stacked and "Expert" in type(one.module).__name__


def _num_calls(model: Any) -> dict[str, int]:
    """How often each module runs in a forward pass, by name; none where the architecture does not
    run without numbers, such as mixtures that look where their tokens go."""
    import torch

    calls: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():

        def count(*_: Any, name: str = name) -> None:
            calls[name] = calls.get(name, 0) + 1

        hooks.append(module.register_forward_pre_hook(count))
    try:
        with translated(lambda error: SpecError("model", one_line(error))), torch.no_grad():
            model.eval()(input_ids=torch.zeros(1, 4, dtype=torch.int64, device="meta"))
    except SpecError:
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return calls


if __name__ == "__main__":
    main()
