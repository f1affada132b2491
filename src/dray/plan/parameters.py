"""A model's sizes and its number of parameters: by formula, or as the architecture itself was
counted.

The formulas equal transformers' own models for the families below, by name and sizes and with the
options that they heed: a test builds them on the meta device. Whatever else is asked for is counted
from above (`Counted`); where that cannot be, the formula is an estimate that says so. A folder's
config.json is read as it is. Refuses folders that cannot be read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dray.errors import SpecError
from dray.plan.architectures import (
    HEEDED_OPTIONS,
    OFFSET_POSITIONS,
    default_intermediate_size,
    is_gated,
    position_rows,
)
from dray.plan.rows import RowCost
from dray.spec import Head, Optimizer, Spec
from dray.storage.packages import in_package

ROTARY_GATED = ("llama", "mistral", "qwen2")
ENCODERS = ("bert", "roberta", "distilbert", "modernbert", "vit")
FAMILIES = (*ROTARY_GATED, "gpt2", "gpt_neox", "gpt_bigcode", "starcoder2", "nemotron", *ENCODERS)
TRAINED_PAD_ID = 1
"""The padding token of tokenisers that a run trains, after the end of a text."""
# Where a field has another name in the folder of an architecture.
_ALIASES = {
    "hidden_size": ("hidden_size", "n_embd", "dim", "d_model"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size", "n_inner", "hidden_dim", "ffn_dim", "d_ff"),
    "vocab_size": ("vocab_size",),
    "max_positions": ("max_position_embeddings", "n_positions"),
}


Attention = tuple[tuple[int, int], ...]
"""Groups of blocks that attend: how many, and how many tokens of a row each of theirs sees at most;
0: all of them."""


@dataclass(frozen=True)
class Dimensions:
    """What decides a model's size and work."""

    architecture: str
    head: Head
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the feed-forward; in mixtures, of the experts that a token goes to."""
    vocab: int
    positions: int
    tied: bool
    num_labels: int
    gated: bool
    exact: bool
    """Whether the formulas are known to give what transformers builds."""
    options: Mapping[str, Any]
    causal: bool
    """Whether a token attends only to those before it."""
    attention: Attention
    row: RowCost | None = None
    """What a row was found to cost; None: it is of tokens, and formulas tell."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters."""

    total: int
    embedding: int
    """Tables that are looked up, not multiplied: tokens, positions, types."""
    head: int
    """The output projection; a tied one is counted here too, but once in total."""
    layer: int
    """One block, the largest where they differ."""
    largest: int
    """The largest single tensor."""

    body: int
    """Neither embedding nor head."""
    active: int
    """What of the body a token goes through: of a mixture the experts that it is sent to, and
    blocks that are gone through several times as often as that."""
    base: int = 0
    """Of the total, those that are never trained: they have no gradients and no optimiser's states,
    and stand in no checkpoint."""
    packed: int = 0
    """Of the base, those that are held in 4 bits."""

    @property
    def trained(self) -> int:
        return self.total - self.base


class Counted(BaseModel):
    """What an architecture itself was found to be, on a model that was built without memory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: ParameterCount
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    causal: bool
    attention: Attention
    row: RowCost | None = None
    """What a row costs, where it is no text."""

    def sizes(self, by_formula: Dimensions) -> Dimensions:
        """The sizes with those that were found."""
        found = {name: getattr(self, name) for name in type(self).model_fields if name != "count"}
        return replace(by_formula, **found)

    def with_layers(self, layers: int) -> ParameterCount:
        """The count with fewer blocks, about: each is taken to be as large as they are on
        average."""
        count, taken = self.count, self.layers - layers
        total, active = (
            whole - taken * (whole_body // max(1, self.layers))
            for whole, whole_body in ((count.total, count.body), (count.active, count.active))
        )
        body = count.body - (count.total - total)
        return replace(count, total=total, active=active, body=body)


def load_dimensions(
    spec: Spec,
    vocab_size: int | None = None,
    num_labels: int | None = None,
    config: Mapping[str, Any] | None = None,
    pad_token_id: int | None = None,
    *,
    counted: Counted | None = None,
) -> Dimensions:
    """The sizes that a spec (and its folder's config.json, where it names one) decides.

    `vocab_size` and `pad_token_id` are the tokeniser's. `config`: the configuration of the weights
    that the model starts from, as the run keeps it; then nothing is read. `counted`: what the
    architecture was found to be, which goes before what its fields say. Raises SpecError for an
    unreadable folder or a vocabulary that is too small.
    """
    model = spec.model
    labels = spec.task.num_outputs or model.num_labels or num_labels or 2
    if model.origin:
        config = config or load_config(str(model.path))
        return _origin_dimensions(spec, vocab_size, labels, config, counted)
    architecture, hidden, heads = (
        str(model.architecture),
        int(model.hidden_size or 0),
        int(model.num_heads or 0),
    )
    gated = is_gated(architecture)
    tokens = vocab_size or spec.tokenizer.vocab_size
    if spec.tokenizer.path is not None and vocab_size is None:
        tokens = (
            _tokenizer_size(spec.tokenizer.path) or model.vocab_size or spec.tokenizer.vocab_size
        )
    rows = model.vocab_size or tokens
    if rows < tokens:
        raise SpecError(
            f"model.vocab_size = {rows}",
            f"the tokeniser has {tokens} tokens",
            "every token needs a row of the embedding",
            f"leave it out, or give {tokens} or more",
        )
    positions = model.max_positions or spec.row_tokens
    if positions < spec.row_tokens:
        raise SpecError(
            f"model.max_positions = {positions}",
            f"data.sequence_tokens is {spec.row_tokens}",
            "a row must fit the model",
            f"give {spec.row_tokens} or more",
        )
    options = dict(model.options)
    if pad_token_id is None and spec.tokenizer.train is not None:
        pad_token_id = TRAINED_PAD_ID
    knows_pad = (
        pad_token_id is not None or vocab_size is not None or architecture not in OFFSET_POSITIONS
    )
    heeded = all(name in HEEDED_OPTIONS.get(architecture, ()) for name in options)
    layers = int(model.num_layers or 0)
    sizes = Dimensions(
        architecture=architecture,
        head=spec.task.head,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_kv_heads(architecture, options, model.num_kv_heads or heads),
        head_dim=int(str(options.get("head_dim") or hidden // max(1, heads))),
        intermediate=model.intermediate_size or default_intermediate_size(architecture, hidden),
        vocab=rows,
        positions=position_rows(architecture, positions, pad_token_id),
        tied=model.tie_embeddings,
        num_labels=labels,
        gated=gated,
        exact=architecture in FAMILIES and knows_pad and heeded,
        options=options,
        causal=_is_causal(architecture, spec.task.head),
        attention=_attention(architecture, layers, options),
    )
    return sizes if counted is None else counted.sizes(sizes)


def _is_causal(architecture: str, head: Head) -> bool:
    """Encoders look both ways unless they are to generate."""
    return not head.looks_ahead or (head.over != "vocabulary" and architecture not in ENCODERS)


def _attention(architecture: str, layers: int, options: Mapping[str, Any]) -> Attention:
    """Mistral and StarCoder2 may look back a few thousand tokens only, two of three blocks of
    ModernBERT 64 to either side."""
    if architecture == "modernbert":
        whole = -(-layers // 3)
        near = int(options.get("local_attention") or 128) + 1
        return ((whole, 0), (layers - whole, near)) if layers > whole else ((whole, 0),)
    usual = 4096 if architecture == "mistral" else 0
    if architecture in ("mistral", "starcoder2"):
        return ((layers, int(options.get("sliding_window", usual) or 0)),)
    return ((layers, 0),)


def _kv_heads(architecture: str, options: Mapping[str, Any], heads: int) -> int:
    """GPT BigCode shares one head of keys and values, unless told otherwise."""
    return 1 if architecture == "gpt_bigcode" and options.get("multi_query", True) else heads


def count_parameters(sizes: Dimensions) -> ParameterCount:
    """Numbers of parameters, from the shapes of the architecture's tensors."""
    hidden, vocab = sizes.hidden, sizes.vocab
    tables, extra = _embeddings(sizes)
    layer = _layer(sizes)
    body = tables + extra + sizes.layers * layer + _end_of_body(sizes)
    head, tail = _head(sizes)
    if sizes.head.over == "vocabulary":
        total = body + tail + (0 if sizes.tied else vocab * hidden)
        head = vocab * hidden
    else:
        total = body + head + tail
    if sizes.architecture == "modernbert":
        total -= hidden  # its first block has no norm before attention
    largest = max(
        tables if sizes.architecture == "vit" else vocab * hidden,
        hidden * sizes.intermediate * (2 if sizes.architecture == "modernbert" else 1),
        3 * hidden * hidden,
    )
    owned_head = 0 if sizes.head.over == "vocabulary" and sizes.tied else head
    return ParameterCount(
        total=total,
        embedding=tables,
        head=head,
        layer=layer,
        largest=min(largest, total),
        body=total - tables - owned_head,
        active=total - tables - owned_head,
    )


def count_state_bytes(optimizer: Optimizer, sizes: Dimensions, count: ParameterCount) -> int:
    """Bytes of what the optimiser keeps for all parameters. What it keeps for a vector goes by its
    elements; what is a matrix, and in a block, is told by the architecture's usual tensors."""

    def kept(shape: tuple[int, ...], *, is_hidden: bool = False) -> int:
        return sum(state.num_bytes for state in optimizer.states(shape, is_hidden=is_hidden))

    if optimizer.elementwise or sizes.row is not None:  # of unknown matrices at most as much
        return count.trained * kept((1,))
    if count.base:  # as if what is trained were of the mixture of the whole
        whole = count_state_bytes(optimizer, sizes, replace(count, base=0))
        return whole * count.trained // count.total
    hidden = _block_matrices(sizes) * sizes.layers
    tables = [(count.embedding // sizes.hidden, sizes.hidden)]
    head_rows = sizes.vocab if sizes.head.over == "vocabulary" else sizes.num_labels
    has_own = sizes.head.over == "labels" or (sizes.head.over == "vocabulary" and not sizes.tied)
    if has_own:
        tables.append((head_rows, sizes.hidden))
    rest = count.total - sum(map(math.prod, (*hidden, *tables)))
    matrices = sum(kept(shape, is_hidden=True) for shape in hidden) + sum(map(kept, tables))
    return matrices + max(0, rest) * kept((1,))


def _block_matrices(sizes: Dimensions) -> list[tuple[int, int]]:
    """The matrices of one block; of those that an architecture has in one piece the parts."""
    hidden, wide = sizes.hidden, sizes.intermediate
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    attention = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    gates = 2 if sizes.gated or sizes.architecture == "modernbert" else 1
    return [*attention, *[(wide, hidden)] * gates, (hidden, wide)]


def _embeddings(sizes: Dimensions) -> tuple[int, int]:
    """(tables that are looked up, what else lies before the first block)"""
    hidden, architecture = sizes.hidden, sizes.architecture
    tokens = sizes.vocab * hidden
    if architecture == "vit":
        patch, image = (
            int(sizes.options.get("patch_size", 16)),
            int(sizes.options.get("image_size", 224)),
        )
        channels = int(sizes.options.get("num_channels", 3))
        return ((image // patch) ** 2 + 2) * hidden, (channels * patch**2 + 1) * hidden
    if architecture in ("bert", "roberta"):
        types = int(sizes.options.get("type_vocab_size", 2))
        return tokens + (sizes.positions + types) * hidden, 2 * hidden
    if architecture == "distilbert":
        return tokens + sizes.positions * hidden, 2 * hidden
    if architecture in ("gpt2", "gpt_bigcode"):
        return tokens + sizes.positions * hidden, 0
    return tokens, hidden if architecture == "modernbert" else 0


def _layer(sizes: Dimensions) -> int:
    """One block: attention, feed-forward and two norms."""
    hidden, wide, options = sizes.hidden, sizes.intermediate, sizes.options
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    if sizes.architecture == "modernbert":
        return 4 * hidden * hidden + 3 * hidden * wide + 2 * hidden
    if sizes.architecture in ("gpt_bigcode", "starcoder2", "nemotron"):
        attention, feed_forward = hidden * (2 * queries + 2 * keys), 2 * hidden * wide
        if sizes.architecture == "gpt_bigcode" or options.get(
            "use_bias", sizes.architecture == "starcoder2"
        ):
            return (
                attention + queries + 2 * keys + hidden + feed_forward + wide + hidden + 4 * hidden
            )
        return attention + feed_forward + 4 * hidden
    if sizes.architecture in ROTARY_GATED or sizes.architecture not in FAMILIES:
        attention = hidden * (2 * queries + 2 * keys)
        if sizes.architecture == "qwen2":
            attention += queries + 2 * keys
        elif options.get("attention_bias"):
            attention += queries + 2 * keys + hidden
        feed_forward = (3 if sizes.gated else 2) * hidden * wide
        if options.get("mlp_bias"):
            feed_forward += 2 * wide + hidden
        return attention + feed_forward + 2 * hidden
    attention = 4 * hidden * hidden + (4 * hidden if options.get("attention_bias", True) else 0)
    return attention + 2 * hidden * wide + wide + hidden + 4 * hidden


def _end_of_body(sizes: Dimensions) -> int:
    """The norm after the last block."""
    if sizes.architecture in ("bert", "roberta", "distilbert"):
        return 0
    has_bias = sizes.architecture in FAMILIES and sizes.architecture not in (
        *ROTARY_GATED,
        "modernbert",
    )
    return 2 * sizes.hidden if has_bias else sizes.hidden


def _head(sizes: Dimensions) -> tuple[int, int]:
    """(classifier's matrix and what else is multiplied, biases and norms of the head)

    For language models the projection itself is counted by the caller.
    """
    hidden, labels, name = sizes.hidden, sizes.num_labels, sizes.architecture
    if sizes.head.over == "hidden":
        return 0, 0
    if sizes.head.over == "vocabulary":
        if name in ("bert", "roberta"):
            return 0, hidden * hidden + 3 * hidden + sizes.vocab
        if name in ("distilbert", "modernbert"):
            return 0, hidden * hidden + (3 if name == "distilbert" else 1) * hidden + sizes.vocab
        return 0, 0
    pools = name in ("bert", "roberta", "distilbert") and sizes.head.each == "row"
    if pools or name == "modernbert":
        return hidden * hidden + labels * hidden, hidden + labels
    return labels * hidden, labels if name == "vit" or sizes.head.each == "token" else 0


def load_config(path: str) -> Mapping[str, Any]:
    """A folder's config.json. Raises SpecError."""
    folder = _local_folder(path)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise SpecError(
            "model.path",
            f"{folder}/config.json cannot be read ({error})",
            "a Hugging Face folder is wanted",
            "`dray export` writes one",
        ) from error
    return config


def _origin_dimensions(
    spec: Spec,
    vocab_size: int | None,
    labels: int,
    config: Mapping[str, Any],
    counted: Counted | None,
) -> Dimensions:
    origin = spec.model.origin
    architecture = str(config.get("model_type", "unknown"))
    text = config.get("text_config")  # models of several kinds of data keep their sizes apart
    fields = {**config, **text} if isinstance(text, Mapping) else config
    found = {
        ours: next((fields[name] for name in names if isinstance(fields.get(name), int)), 0)
        for ours, names in _ALIASES.items()
    }
    missing = [name for name in ("hidden_size", "num_layers", "num_heads") if not found[name]]
    if missing and counted is None:
        raise SpecError(
            spec.model.origin_key,
            f"the configuration of {origin} lacks {', '.join(missing)}",
            "sizes are needed to plan",
        )
    gated, hidden, heads = is_gated(architecture), found["hidden_size"], found["num_heads"]
    vocab = found["vocab_size"] or (counted.vocab if counted else vocab_size) or 0
    if vocab_size is not None and 0 < vocab < vocab_size:
        raise SpecError(
            spec.model.origin_key,
            f"{origin} has {vocab} tokens, the tokeniser {vocab_size}",
            "weights and tokeniser belong together",
            f"use its own: {spec.model.own_tokenizer}",
        )
    tied = fields.get(
        "tie_word_embeddings", architecture not in (*ROTARY_GATED, "gpt_neox", "nemotron")
    )
    sizes = Dimensions(
        architecture=architecture,
        head=spec.task.head,
        hidden=hidden,
        layers=found["num_layers"],
        heads=heads,
        kv_heads=_kv_heads(architecture, fields, found["num_kv_heads"] or heads),
        head_dim=found["head_dim"] or hidden // max(1, heads),
        intermediate=found["intermediate_size"] or default_intermediate_size(architecture, hidden),
        vocab=vocab,
        positions=found["max_positions"] or spec.data.sequence_tokens,
        tied=bool(tied),
        num_labels=labels,
        gated=gated,
        exact=False,  # a folder's fields may say anything
        options=fields,
        causal=_is_causal(architecture, spec.task.head),
        attention=_attention(architecture, found["num_layers"], fields),
    )
    return sizes if counted is None else counted.sizes(sizes)


def _local_folder(path: str) -> Path:
    """The folder itself, or what the hub's cache has of `hf://owner/name[@revision]`. Raises
    SpecError if nothing."""
    if not path.startswith("hf://"):
        return Path(in_package(path))
    name, _, revision = path.removeprefix("hf://").partition("@")
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    model = cache / f"models--{name.replace('/', '--')}"
    commit = model / "refs" / (revision or "main")
    snapshot = (
        model
        / "snapshots"
        / (commit.read_text(encoding="utf-8").strip() if commit.is_file() else revision)
    )
    if not (snapshot / "config.json").is_file():
        raise SpecError(
            "model.path",
            f"{path} is not in the hub's cache ({cache})",
            "planning downloads nothing",
            f"hf download {name}",
        )
    return snapshot


def _tokenizer_size(folder: str) -> int | None:
    """Tokens of a folder's tokenizer.json, the added ones included; None if there is no such
    file."""
    try:
        tree = json.loads((Path(in_package(folder)) / "tokenizer.json").read_text(encoding="utf-8"))
        ids = list(tree["model"]["vocab"].values()) + [
            token["id"] for token in tree.get("added_tokens", [])
        ]
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return max(ids) + 1 if ids and all(isinstance(i, int) for i in ids) else None
