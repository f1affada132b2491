"""The files of a tokeniser's folder: made whole before a corpus is encoded, and dressed for
transformers afterwards.

Functions of file contents by name, to the same. tokenizer.json is the truth about how text becomes
ids; what the other files add to it (tokens, their names) is put into it, so that dray and
transformers read the same thing. Refuses files that contradict each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dray.errors import CorpusError, first_line, translated

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
KEPT_SETTINGS = ("chat_template", "clean_up_tokenization_spaces")
"""Settings of a tokenizer_config.json that outlive an export, besides the names of tokens in the
vocabulary."""
EXTRA_TOKENS = ("extra_special_tokens", "additional_special_tokens")

Files = dict[str, bytes]


@dataclass(frozen=True)
class Dress:
    """How training dressed a text, which an exported tokeniser repeats."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad_token_id: int | None
    eos_token_id: int | None
    normalize: str
    """Unicode normal form of the texts: NFC, NFKC or none."""
    max_tokens: int
    """Longest row that the model takes, with what stands around the text."""


def read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A JSON object among the files; empty if it is absent. Raises CorpusError if it is anything
    else."""
    try:
        tree = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise CorpusError(
            "tokenizer.path", f"{name} is broken JSON ({error})", "the folder must be sound"
        ) from error
    if not isinstance(tree, dict):
        raise CorpusError(
            "tokenizer.path", f"{name} holds a {type(tree).__name__}", "a JSON object is wanted"
        )
    return tree


def dump_json(tree: Any) -> bytes:
    return (json.dumps(tree, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()


def load_tokenizer(files: Mapping[str, bytes]) -> Any:
    """The `tokenizers.Tokenizer` of the files, without truncation and padding: dray does both.
    Raises CorpusError."""
    from tokenizers import Tokenizer

    rule = "a file that the tokenizers library writes is wanted"
    with translated(
        lambda error: CorpusError(
            "tokenizer.path", f"{TOKENIZER_JSON} cannot be loaded ({first_line(error)})", rule
        )
    ):
        tokenizer = Tokenizer.from_str(files[TOKENIZER_JSON].decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """The text of each token that has a role, such as `eos_token`."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
        for key, value in read_json(files, name).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                found[key] = content
    return found


def all_special_tokens(files: Mapping[str, bytes]) -> frozenset[str]:
    """The texts of all tokens that no text is made of: those with a role, and others that the files
    call special."""
    found = {*special_tokens(files).values(), *_extra_tokens(files)}
    for token in read_json(files, TOKENIZER_JSON).get("added_tokens") or ():
        if isinstance(token, dict) and token.get("special"):
            found.add(str(token.get("content")))
    return frozenset(found)


def find_chat_template(files: Mapping[str, bytes]) -> str | None:
    """The template by which conversations become texts: a file of its own, or a setting; of several
    with names the one called default."""
    if CHAT_TEMPLATE in files:
        return files[CHAT_TEMPLATE].decode()
    found = read_json(files, TOKENIZER_CONFIG).get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def from_byte_level_files(files: Files, place: str) -> Files:
    """A tokenizer.json from the bare vocab.json and merges.txt of GPT-2's kind. Raises
    CorpusError."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = read_json(files, "vocab.json")
    if not set(pre_tokenizers.ByteLevel.alphabet()) <= vocab.keys():
        raise CorpusError(
            "tokenizer.path",
            f"{place}/vocab.json lacks some of the 256 bytes",
            "a bare vocab.json with merges.txt is read as byte-level BPE, as GPT-2's",
            f"add a {TOKENIZER_CONFIG} that names its tokenizer_class",
        )
    lines = files["merges.txt"].decode(errors="replace").split("\n")
    pairs = [
        line.rstrip("\r").split(" ")
        for line in lines[lines[0].startswith("#version") :]
        if line.strip()
    ]
    rule = "every merge's parts and result are in the vocabulary"
    with translated(
        lambda error: CorpusError(
            "tokenizer.path",
            f"{place}: vocab.json and merges.txt do not fit ({first_line(error)})",
            rule,
        )
    ):
        tokenizer = Tokenizer(
            models.BPE(vocab=vocab, merges=[(left, right) for left, right in pairs])
        )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    config = read_json(files, TOKENIZER_CONFIG)
    if END_OF_TEXT in vocab:
        config.setdefault("eos_token", END_OF_TEXT)
    return files | {
        TOKENIZER_JSON: str(tokenizer.to_str()).encode(),
        TOKENIZER_CONFIG: dump_json(config),
    }


def completed(files: Files) -> Files:
    """The files with every token that they name inside tokenizer.json, as transformers would add it
    when it loads them.

    A token that has a role but no row in the vocabulary is left out: the model has no embedding for
    it. Raises CorpusError for a token whose id is taken by another.
    """
    from tokenizers import AddedToken

    tokenizer = load_tokenizer(files)
    for token_id, token in sorted(_tokens_with_ids(files).items()):
        if tokenizer.token_to_id(token.content) is None:
            tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise CorpusError(
                "tokenizer.path",
                f"{token.content!r} has the id {token_id} in one file and "
                f"{tokenizer.token_to_id(token.content)} in {TOKENIZER_JSON}",
                "the files must agree",
            )
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    named = [
        name
        for name in dict.fromkeys([*special_tokens(files).values(), *_extra_tokens(files)])
        if name not in known and tokenizer.token_to_id(name) is not None
    ]
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in named]
    )
    return files | {TOKENIZER_JSON: str(tokenizer.to_str()).encode()}


def _extra_tokens(files: Mapping[str, bytes]) -> list[str]:
    """Special tokens without a role of their own."""
    found: list[str] = []
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
        tree = read_json(files, name)
        for value in (tree.get(key) or () for key in EXTRA_TOKENS):
            for token in value.values() if isinstance(value, dict) else value:
                content = token.get("content") if isinstance(token, dict) else token
                found += [content] if isinstance(content, str) else []
    return list(dict.fromkeys(found))


def _tokens_with_ids(files: Files) -> dict[int, Any]:
    """Tokens that stand with their ids in the files beside tokenizer.json, as
    `tokenizers.AddedToken`."""
    from tokenizers import AddedToken

    found: dict[int, Any] = {}
    roles = set(special_tokens(files).values())
    for name, token_id in read_json(files, "added_tokens.json").items():
        found[int(token_id)] = AddedToken(name, special=name in roles, normalized=name not in roles)
    for token_id, flags in (
        read_json(files, TOKENIZER_CONFIG).get("added_tokens_decoder") or {}
    ).items():
        if isinstance(flags, dict) and "content" in flags:
            kept = {
                key: bool(flags[key])
                for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
                if key in flags
            }
            found[int(token_id)] = AddedToken(flags["content"], **kept)
    return found


def dressed(files: Files, dress: Dress) -> Files:
    """The files of an export: transformers' AutoTokenizer gives, by its defaults, the ids that
    training gave.

    Its template, normal form, padding, truncation and greatest length are training's. A tokeniser
    without a tokenizer.json keeps its own template.
    """
    config = {
        key: value
        for key, value in read_json(files, TOKENIZER_CONFIG).items()
        if key in KEPT_SETTINGS
    }
    config |= {
        "model_max_length": dress.max_tokens,
        "padding_side": "right",
        "truncation_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    config.setdefault("clean_up_tokenization_spaces", False)
    if TOKENIZER_JSON not in files:
        return files | {TOKENIZER_CONFIG: dump_json(read_json(files, TOKENIZER_CONFIG) | config)}
    tokenizer = load_tokenizer(files)
    roles = {
        key: name
        for key, name in special_tokens(files).items()
        if tokenizer.token_to_id(name) is not None
    }
    for key, token_id in (("pad_token", dress.pad_token_id), ("eos_token", dress.eos_token_id)):
        if token_id is not None:
            roles[key] = tokenizer.id_to_token(token_id)
    tree = json.loads(tokenizer.to_str())
    tree["normalizer"] = _with_normal_form(tree["normalizer"], dress.normalize)
    names = {
        token_id: tokenizer.id_to_token(token_id) for token_id in (*dress.prefix, *dress.suffix)
    }
    tree["post_processor"] = _with_template(tree["post_processor"], dress, names)
    # Transformers would make up ids for those that the vocabulary lacks.
    extra = [name for name in _extra_tokens(files) if tokenizer.token_to_id(name) is not None]
    config |= {"extra_special_tokens": extra} if extra else {}
    kept = {name: content for name, content in files.items() if name == CHAT_TEMPLATE}
    # The class that takes tokenizer.json as it is; others build their own splitting, template and
    # normal form.
    config |= roles | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return kept | {TOKENIZER_JSON: dump_json(tree), TOKENIZER_CONFIG: dump_json(config)}


def _with_normal_form(normalizer: Any, form: str) -> Any:
    steps = list(_flattened(normalizer, "normalizers"))
    if form == "none" or (steps and steps[0]["type"] == form):
        return normalizer
    return {"type": "Sequence", "normalizers": [{"type": form}, *steps]}


def _with_template(processor: Any, dress: Dress, names: Mapping[int, str]) -> Any:
    """A post-processor that puts training's prefix and suffix around a text; what only moves
    offsets stays."""

    def around(text: str, type_id: int, prefix: tuple[int, ...]) -> list[dict[str, Any]]:
        token = [{"SpecialToken": {"id": names[i], "type_id": type_id}} for i in prefix]
        end = [{"SpecialToken": {"id": names[i], "type_id": type_id}} for i in dress.suffix]
        return [*token, {"Sequence": {"id": text, "type_id": type_id}}, *end]

    template = {
        "type": "TemplateProcessing",
        "single": around("A", 0, dress.prefix),
        "pair": around("A", 0, dress.prefix) + around("B", 1, ()),
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]} for i, name in names.items()
        },
    }
    others = [step for step in _flattened(processor, "processors") if step["type"] == "ByteLevel"]
    return {"type": "Sequence", "processors": [*others, template]} if others else template


def _flattened(step: Any, members: str) -> Iterator[dict[str, Any]]:
    """The steps of a pipeline in a tokenizer.json, whether it is one, several or none."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for member in step[members]:
            yield from _flattened(member, members)
    else:
        yield step
