"""From the spec's model section to a transformers configuration: any architecture by name and
sizes, or a folder's own.

Refuses what would otherwise train silently wrong: unknown architectures and options, sizes that
contradict a folder's, a vocabulary that is not the tokeniser's, rows longer than the positions,
quantised or pickled weights, remote code.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dray.errors import SpecError, caught, first_line, one_line, translated
from dray.models.source import find_folder
from dray.plan.architectures import OFFSET_POSITIONS, default_intermediate_size, position_rows
from dray.processes.imports import whole
from dray.spec import Head, Spec
from dray.storage.packages import in_package

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"

INTERMEDIATE_NAMES = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "hidden_dim",
    "d_ff",
    "d_inner",
    "ffn_hidden_size",
    "decoder_ffn_dim",
)
NUM_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_moe_experts",
)
"""Where a configuration says how many experts a mixture has."""
_BRINGS_CODE = frozenset(
    f"{prefix}{name}{suffix}"
    for name in ("attn_implementation", "experts_implementation")
    for prefix in ("", "_")
    for suffix in ("", "_internal")
) | {"auto_map", "use_kernels"}
"""Fields by which a configuration names code that transformers would fetch and run."""
_EXPERTS_ALIGNED = 16
"""The experts' widths of a mixture must be a multiple of 16 bytes: their products are grouped."""
_TWICE = {
    "num_hidden_layers": ("encoder_layers", "num_encoder_layers", "num_layers"),
    "num_attention_heads": ("encoder_attention_heads", "num_encoder_attention_heads"),
}
"""Where some architectures keep a size under another name."""
_DECODERS = {
    "num_hidden_layers": ("decoder_layers", "num_decoder_layers"),
    "num_attention_heads": ("decoder_attention_heads", "num_decoder_attention_heads"),
    "intermediate_size": ("encoder_ffn_dim", "decoder_ffn_dim"),
}
"""Where those with an encoder and a decoder keep one for each of them."""
_OWN_KEYS = {
    "vocab_size": "model.vocab_size",
    "hidden_size": "model.hidden_size",
    "num_hidden_layers": "model.num_layers",
    "num_attention_heads": "model.num_heads",
    "num_key_value_heads": "model.num_kv_heads",
    "max_position_embeddings": "model.max_positions",
    "tie_word_embeddings": "model.tie_embeddings",
    "num_labels": "model.num_labels",
}
"""Fields of a configuration that the spec has its own keys for."""
_SET_HERE = (
    "is_decoder",
    "use_cache",
    "problem_type",
    "id2label",
    "label2id",
    "architectures",
    "dtype",
    "torch_dtype",
)
"""Fields that follow from the task, the labels and the precision."""


def make_config(
    spec: Spec,
    *,
    vocab_size: int,
    num_labels: int = 2,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
    labels: Sequence[str] = (),
    kept: Mapping[str, Any] | None = None,
) -> Any:
    """The transformers configuration of the spec's model for the spec's task.

    `vocab_size` is the tokeniser's; `labels` name the classes. `kept`: the configuration of the
    weights that it starts from (`read_config`), or that of a model by name and sizes, as the run
    keeps it; then nothing is read. Raises SpecError.
    """
    if spec.model.origin:
        config = _origin_config(spec, vocab_size, kept)
    elif kept is not None:
        config = _kept_config(kept)
    else:
        config = _sized_config(
            spec, vocab_size, eos_token_id if pad_token_id is None else pad_token_id
        )
    if pad_token_id is None and config.model_type in OFFSET_POSITIONS:
        pad_token_id = config.pad_token_id if spec.model.origin else eos_token_id
    head = spec.task.head
    is_new = not spec.model.origin and kept is None
    _set_token_ids(config, head, pad_token_id, eos_token_id, is_new=is_new)
    if hasattr(config, "is_decoder") and not head.looks_ahead:
        config.is_decoder = True  # BERT and its kin look both ways unless told
    if head.over == "labels":
        config.num_labels = spec.model.num_labels or num_labels
        config.problem_type = head.problem_type
        if len(labels) == config.num_labels:
            config.id2label = {index: str(label) for index, label in enumerate(labels)}
            config.label2id = {str(label): index for index, label in enumerate(labels)}
    if hasattr(config, "use_cache"):
        config.use_cache = False
    for name, value in spec.task.model_options.items():
        if hasattr(config, name):
            setattr(config, name, value)
    model_class = auto_class(head)._model_mapping.get(type(config), None)
    if model_class is None:
        raise SpecError(
            "model",
            f"{config.model_type} has no {spec.task.name} model",
            "the architecture must serve the task",
            _nearest(config.model_type, _names_for(spec.task.head)),
        )
    classes = model_class if isinstance(model_class, (list, tuple)) else (model_class,)
    config.architectures = [classes[0].__name__]
    return config


def auto_class(head: Head) -> Any:
    """The transformers class that builds models with a head."""
    return getattr(whole("transformers"), head.auto_class)


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a folder whole, with what transformers takes for granted, as a run keeps
    it. Raises SpecError."""
    auto_config = whole("transformers").AutoConfig
    rule = "an architecture that transformers knows is wanted; remote code is never run"
    with translated(
        lambda error: SpecError(
            "model.path", f"{folder}: config.json cannot be used ({first_line(error)})", rule
        )
    ):
        config = auto_config.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if getattr(config, "quantization_config", None):
        raise SpecError(
            "model.path", f"{folder} holds quantised weights", "training starts from full ones"
        )
    tree: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in tree.items() if name not in _BRINGS_CODE}


def make_kept_config(model: Any) -> dict[str, Any]:
    """The configuration of a built model, as a run keeps it: without the precision of its weights,
    which is a matter of the place."""
    tree: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return {name: value for name, value in tree.items() if name not in ("dtype", "torch_dtype")}


def _kept_config(kept: Mapping[str, Any]) -> Any:
    """The configuration that a run keeps, as transformers' own. Raises SpecError."""
    tree = {name: value for name, value in kept.items() if name not in _BRINGS_CODE}
    rule = "it is what dray wrote there when the run began"
    with translated(
        lambda error: SpecError(
            "model.json", f"the run's configuration cannot be used ({first_line(error)})", rule
        )
    ):
        return whole("transformers").CONFIG_MAPPING[tree["model_type"]].from_dict(tree)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, whole or sharded. Raises SpecError."""
    index = folder / SAFETENSORS_INDEX
    if (folder / SAFETENSORS).is_file():
        return [folder / SAFETENSORS]
    if not index.is_file():
        raise SpecError(
            "model.path",
            f"{folder} holds no {SAFETENSORS}",
            "weights are read from safetensors, never pickles",
            "save the model with transformers' save_pretrained, or `dray export`",
        )
    with translated(
        lambda error: SpecError(
            "model.path",
            f"{index} cannot be used ({first_line(error)})",
            "the folder must be whole",
        )
    ):
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({str(name) for name in listed})
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise SpecError(
                "model.path",
                f"{index} lists {name}, which is not in the folder",
                "the folder must be whole",
            )
    return [folder / name for name in names]


def _sized_config(spec: Spec, vocab_size: int, pad_token_id: int | None) -> Any:
    architectures = whole("transformers").CONFIG_MAPPING
    model, known = spec.model, _names_for(spec.task.head)
    if model.architecture not in architectures:
        raise SpecError(
            "model.architecture",
            f"{model.architecture!r} is unknown to transformers",
            way_out=_nearest(str(model.architecture), known),
        )
    default = architectures[model.architecture]()
    settable = set(default.to_dict()) | set(default.attribute_map)
    if spec.task.tokenizes:
        fields = _sizes_of_tokens(spec, vocab_size, pad_token_id)
        _check_takes_sizes(default, settable, known)
    else:
        fields = _given_sizes(spec, settable)
    for twins in (_TWICE, _DECODERS):
        fields |= {
            twin: fields[name]
            for name in fields
            for twin in twins.get(name, ())
            if twin in settable
        }
    fields = {name: value for name, value in fields.items() if name in settable}
    if "qk_rope_head_dim" in settable:  # the rotated part of a head has a size of its own
        fields.pop("head_dim", None)
    if model.num_kv_heads not in (None, model.num_heads) and "num_key_value_heads" not in fields:
        raise SpecError(
            f"model.num_kv_heads = {model.num_kv_heads}",
            f"{model.architecture} has no grouped heads",
            way_out="leave it out",
        )
    fields |= _intermediate(spec, default) | _dropouts(default, spec)
    # Ids of the architecture's own tokeniser may lie outside this one's vocabulary.
    fields |= dict.fromkeys(_token_id_fields(default), 0)
    follows = spec.task.model_options
    fields |= {name: value for name, value in follows.items() if hasattr(default, name)}
    fields |= _checked_options(spec, default)
    return _constructed(type(default), fields)


def _sizes_of_tokens(spec: Spec, vocab_size: int, pad_token_id: int | None) -> dict[str, Any]:
    """The sizes of a model of tokens. Raises SpecError for one that has no room for them."""
    model = spec.model
    rows = model.vocab_size or vocab_size
    if rows < vocab_size:
        raise SpecError(
            f"model.vocab_size = {rows}",
            f"the tokeniser has {vocab_size} tokens",
            "every token needs a row of the embedding",
            f"leave it out, or give {vocab_size} or more",
        )
    positions = model.max_positions or spec.data.sequence_tokens
    if positions < spec.data.sequence_tokens:
        raise SpecError(
            f"model.max_positions = {positions}",
            f"data.sequence_tokens is {spec.data.sequence_tokens}",
            "a row must fit the model",
            f"give {spec.data.sequence_tokens} or more",
        )
    hidden, heads = int(model.hidden_size or 0), int(model.num_heads or 0)
    return {
        "vocab_size": rows,
        "hidden_size": hidden,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": model.num_kv_heads or heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": position_rows(str(model.architecture), positions, pad_token_id),
        "tie_word_embeddings": model.tie_embeddings,
    }


def _given_sizes(spec: Spec, settable: set[str]) -> dict[str, Any]:
    """The sizes that a spec names for a model of no tokens; others are the architecture's own.
    Raises SpecError for one that the architecture has not."""
    model = spec.model
    given = {
        "hidden_size": ("hidden_size", model.hidden_size),
        "num_hidden_layers": ("num_layers", model.num_layers),
        "num_attention_heads": ("num_heads", model.num_heads),
    }
    for name, (key, value) in given.items():
        if value is not None and not settable & {name, *_TWICE.get(name, ())}:
            raise SpecError(
                f"model.{key} = {value}",
                f"{model.architecture} has no such size",
                "an architecture has sizes of its own",
                "leave it out, and give its own in model.options, such as {hidden_sizes: [16, 32]}",
            )
    fields = {name: value for name, (_, value) in given.items() if value is not None}
    if model.num_heads is not None:
        fields["num_key_value_heads"] = model.num_kv_heads or model.num_heads
        if model.hidden_size is not None:
            fields["head_dim"] = model.hidden_size // model.num_heads
    return fields


def _check_takes_sizes(default: Any, settable: set[str], known: Sequence[str]) -> None:
    """Raise SpecError for an architecture that would be built at a size of its own, whatever the
    spec says."""
    name = default.model_type
    if "hidden_size" not in settable:
        text = getattr(default, "text_config", None)
        inner = getattr(text, "model_type", "")
        raise SpecError(
            f"model.architecture = {name}",
            "keeps its sizes in " + ("text_config" if text is not None else "fields of its own"),
            "an architecture by name takes its sizes itself",
            f"give {inner}"
            if inner in known and inner != name
            else "start from a folder: model.path",
        )
    if not settable & {"num_hidden_layers", *_TWICE["num_hidden_layers"]}:
        raise SpecError(
            f"model.architecture = {name}",
            "takes no number of blocks",
            "an architecture by name takes its sizes itself",
            "start from a folder: model.path",
        )


def _constructed(config_class: Any, fields: dict[str, Any]) -> Any:
    renamed = {_stored_name(config_class, name): value for name, value in fields.items()}
    with translated(
        lambda error: SpecError(
            "model", f"{config_class.model_type} refuses these settings ({one_line(error)})"
        )
    ):
        return config_class(**renamed)


def _stored_name(config: Any, name: str) -> str:
    """The configuration's own name of a field: some architectures have another than the usual."""
    return str(config.attribute_map.get(name, name))


def _intermediate_name(config: Any) -> str | None:
    return next((name for name in INTERMEDIATE_NAMES if hasattr(config, name)), None)


def _intermediate(spec: Spec, default: Any) -> dict[str, Any]:
    name = _intermediate_name(default)
    if name is None:
        if spec.model.intermediate_size is None:
            return {}
        raise SpecError(
            f"model.intermediate_size = {spec.model.intermediate_size}",
            f"{spec.model.architecture} has a fixed one",
            way_out="leave it out",
        )
    if spec.model.hidden_size is None and spec.model.intermediate_size is None:
        return {}
    width = default_intermediate_size(default.model_type, int(spec.model.hidden_size or 0))
    if any(hasattr(default, field) for field in NUM_EXPERTS):
        width = -(-width // _EXPERTS_ALIGNED) * _EXPERTS_ALIGNED
    twins = [twin for twin in _DECODERS["intermediate_size"] if hasattr(default, twin)]
    return dict.fromkeys([name, *twins], spec.model.intermediate_size or width)


_DROPPED: Mapping[str, tuple[str, ...]] = {
    "attention": ("attn", "attention"),
    "embedding": ("embd", "embed"),
    "activation": ("activation", "relu"),
    "head": ("classif", "summary", "final", "head"),
}
"""What is dropped, by what a field's name has in it; all else is `hidden`."""


def _dropouts(config: Any, spec: Spec) -> dict[str, Any]:
    """Every dropout probability of a configuration; not the dropping of whole layers. Raises
    SpecError for one that the architecture has not."""
    given = spec.regularization
    own = {} if given.dropouts is None else given.dropouts.model_dump(exclude_none=True)
    names = _dropout_fields(config)
    kinds = {name: _dropped_by(name) for name in names}
    if missing := sorted(own.keys() - set(kinds.values())):
        has = ", ".join(sorted(set(kinds.values()))) or "none"
        raise SpecError(
            f"regularization.dropouts.{missing[0]}",
            f"{config.model_type} drops nothing of that kind",
            f"it has {has}",
            "leave it out",
        )
    return {name: own.get(kind, given.dropout) for name, kind in kinds.items()}


def _dropped_by(name: str) -> str:
    return next(
        (kind for kind, words in _DROPPED.items() if any(word in name for word in words)), "hidden"
    )


def _dropout_fields(config: Any) -> list[str]:
    return [
        name
        for name, value in config.to_dict().items()
        if ("dropout" in name or "pdrop" in name)
        and "layer" not in name
        and "path" not in name
        and (value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)))
    ]


def _token_id_fields(config: Any) -> list[str]:
    return [name for name in config.to_dict() if name.endswith("_token_id")]


def _set_token_ids(
    config: Any, head: Head, pad_token_id: int | None, eos_token_id: int | None, *, is_new: bool
) -> None:
    """The tokeniser's ids; ids of tokens that it has no word for are left out, where a
    configuration allows. What a decoder behind an encoder begins with stays what weights were
    trained with, and is padding, or else the end, where there are none (`is_new`)."""
    start = None if is_new else getattr(config, "decoder_start_token_id", None)
    ids = dict.fromkeys(_token_id_fields(config)) | {
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    if (
        head.over == "vocabulary"
        and pad_token_id == eos_token_id
        and config.model_type not in OFFSET_POSITIONS
    ):
        # nn.Embedding never trains its padding row, and the end of a document must be learnt.
        # Classifiers keep it: decoders are pooled at the last token that is not padding.
        ids["pad_token_id"] = None
    if getattr(config, "is_encoder_decoder", False):
        known = (start, pad_token_id, eos_token_id)
        ids["decoder_start_token_id"] = next((i for i in known if i is not None), 0)
    for name, value in ids.items():
        if caught(partial(setattr, config, name, value))[1] is not None:
            # A few architectures' configurations insist on a number.
            setattr(config, name, eos_token_id or 0)


def _checked_options(spec: Spec, default: Any) -> dict[str, Any]:
    known = [name for name in default.to_dict() if not name.startswith("_")] + list(
        default.attribute_map
    )
    own = {_stored_name(default, name): key for name, key in _OWN_KEYS.items()}
    if (wide := _intermediate_name(default)) is not None:
        own[_stored_name(default, wide)] = "model.intermediate_size"
    if spec.model.origin:  # rotary positions may be told to go on
        del own[_stored_name(default, "max_position_embeddings")]
    for name in spec.model.options:
        if not hasattr(default, name):
            raise SpecError(
                f"model.options.{name}",
                f"no field of {type(default).__name__}",
                way_out=_nearest(name, known),
            )
        if key := own.get(_stored_name(default, name)):
            raise SpecError(
                f"model.options.{name}",
                f"{key} is the same",
                "a setting has one place",
                f"give {key}",
            )
        is_set = name in _SET_HERE or name in spec.task.model_options
        if is_set or name.endswith("_token_id"):
            raise SpecError(
                f"model.options.{name}",
                "follows from the task, the tokeniser or the precision",
                "a setting has one place",
                "leave it out",
            )
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in spec.model.options.items()
    }


def _origin_config(spec: Spec, vocab_size: int, kept: Mapping[str, Any] | None) -> Any:
    if kept is None:
        folder = find_folder(str(spec.model.path))
        weight_files(folder)
        kept = read_config(folder)
        if spec.task.tokenizes:
            check_vocabulary(spec, kept, str(folder), vocab_size)
    config = _kept_config(kept)
    _check_sizes(spec, config)
    for name, value in (_dropouts(config, spec) | _checked_options(spec, config)).items():
        setattr(config, name, value)
    limit = longest_row(config)
    if spec.task.tokenizes and limit is not None and limit < spec.data.sequence_tokens:
        raise SpecError(
            f"data.sequence_tokens = {spec.data.sequence_tokens}",
            f"{spec.model.origin} takes rows of {limit} tokens",
            way_out=f"give {limit} or fewer",
        )
    return config


def longest_row(config: Any) -> int | None:
    """Tokens that a model of the configuration can take at once; None if it counts no positions."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and config.model_type in OFFSET_POSITIONS:
        limit -= (config.pad_token_id or 0) + 1
    return None if limit is None or limit < 1 else int(limit)


def _check_sizes(spec: Spec, config: Any) -> None:
    names = {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
    }
    names |= {name: name for name in ("hidden_size", "intermediate_size", "vocab_size")}
    names["max_positions"] = "max_position_embeddings"
    for ours, theirs in names.items():
        wanted, there = getattr(spec.model, ours), getattr(config, theirs, None)
        if wanted is not None and there is not None and wanted != there:
            raise SpecError(
                f"model.{ours} = {wanted}",
                f"{spec.model.origin} has {there}",
                "weights decide the sizes",
                "leave it out",
            )


def check_vocabulary(
    spec: Spec,
    config: Mapping[str, Any],
    own_tokenizer: str,
    vocab_size: int,
    given_tokenizer: str = "",
) -> None:
    """Raise SpecError unless the spec's tokeniser is the one that its weights were trained with:
    they mean something under that one alone.

    `config` is theirs, `own_tokenizer` the folder with theirs (a path or URI). `vocab_size` is the
    number of the given one's tokens, `given_tokenizer` its folder; empty: `tokenizer.path`.
    """
    model, rule = spec.model, "weights and tokeniser belong together"
    mend = f"use its own: {model.own_tokenizer}"
    if spec.tokenizer.train is not None:
        raise SpecError(
            "tokenizer.train",
            f"{model.origin_key} = {model.run or model.path} was trained with another tokeniser",
            rule,
            mend,
        )
    given = given_tokenizer or in_package(str(spec.tokenizer.path))
    own, ours = _read_vocabulary(own_tokenizer), _read_vocabulary(given)
    if own and ours and own != ours:
        raise SpecError(
            "tokenizer.run" if spec.tokenizer.run else "tokenizer.path",
            f"{spec.tokenizer.run or spec.tokenizer.path} is not the tokeniser of "
            f"{model.run or own_tokenizer}",
            rule,
            mend,
        )
    # More rows than tokens are padding, if this is indeed the weights' tokeniser.
    rows = _kept_config(config).vocab_size
    if rows < vocab_size or (rows > vocab_size and not own):
        raise SpecError(
            model.origin_key,
            f"{model.origin} has {rows} tokens, the tokeniser {vocab_size}",
            rule,
            mend,
        )


def _read_vocabulary(folder: str) -> Any:
    """Tokens and merges of a folder's tokenizer.json; None if there is none."""
    from dray.storage.filesystem import open_filesystem, read_bytes  # `plan` does without pyarrow

    filesystem, path = open_filesystem(folder)
    try:
        content = read_bytes(filesystem, f"{path}/tokenizer.json")
        model = json.loads(content)["model"]
    except (OSError, ValueError, KeyError):
        return None
    merges = model.get("merges")  # pairs, or as older files have them, both parts in one string
    return model.get("vocab"), merges and [
        pair.split(" ") if isinstance(pair, str) else pair for pair in merges
    ]


def _names_for(head: Head) -> list[str]:
    """The architectures that transformers has such a head for."""
    return sorted(auto_class(head)._model_mapping._model_mapping)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    usual = [
        name for name in ("llama", "gpt2", "bert", "modernbert", "distilbert") if name in known
    ] or known[:5]
    return f"did you mean {' or '.join(near)}?" if near else f"e.g. {', '.join(usual)}"
