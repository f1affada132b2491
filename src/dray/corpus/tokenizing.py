"""The tokeniser of a corpus: from a Hugging Face folder, or trained; and the encoder that turns text into ids.

gigatoken encodes only where a check on real documents of this corpus proves that its ids equal those of the Hugging
Face tokeniser; else `tokenizers` does, or transformers for tokenisers without a tokenizer.json. Refuses folders without
a tokeniser, and tokenisers without a token that can end a document.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs as pafs

from dray.errors import CorpusError
from dray.store.filesystem import list_files, open_filesystem, read_bytes, shown, write_bytes

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
TOKENIZER_JSON = "tokenizer.json"
VOCABULARY_FILES = (
    TOKENIZER_JSON, "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model",
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)
KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]", "<|im_end|>")
PROBES = (
    "", " ", "\n\n  x", "don't we'll I'M", "123 ١٢٣ 漢字\u3000😀\u00a0x e\u0301", "\r\n\t \t", "a" * 300,
    "0123456789" * 20, f"a{END_OF_TEXT}b {PAD}", "</s> <s> [SEP] <|im_start|>", "def f(x):\n    return x ** 2  # …",
    "\ufb01 A\u030a \u212b",
)
"""Awkward cases, besides real documents."""
CHECK_BYTES = 400_000
"""Text of real documents on which gigatoken must agree."""

Tokens = npt.NDArray[np.unsignedinteger]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenizerInfo:
    """What the rest of the corpus must know of a tokeniser."""

    vocab_size: int
    """One more than the largest id."""
    pad_token_id: int
    eos_token_id: int | None
    encoder: str
    prefix: tuple[int, ...]
    """Ids that the tokeniser puts before a single text (such as [CLS])."""
    suffix: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return "uint16" if self.vocab_size <= 2**16 else "uint32"


# --- making the folder ---


def train_byte_bpe(texts: Sequence[bytes], vocab_size: int) -> str:
    """A byte-level BPE tokeniser (GPT-2's splitting) as tokenizer.json; the same texts give the same bytes.

    Ids: end of text, pad, the 256 bytes, then the merges in order of their making. Texts hold no null byte.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _train_merges(texts, vocab_size)
    names = [END_OF_TEXT, PAD, *alphabet, *(left + right for left, right in merges)]
    vocab = {name: index for index, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([END_OF_TEXT, PAD])
    return str(tokenizer.to_str(pretty=True))


def _train_merges(texts: Sequence[bytes], vocab_size: int) -> list[tuple[str, str]]:
    """The merges that Hugging Face's trainer makes, by gigatoken's equal but faster one where it is there."""
    try:
        import gigatoken
    except ImportError:
        return _train_merges_slowly(texts, vocab_size)
    with _silence():
        _, merges = gigatoken.train_bpe(b"\0".join(texts), vocab_size, [END_OF_TEXT, PAD], separator=b"\0")
    letters = _byte_letters()
    return [("".join(letters[b] for b in left), "".join(letters[b] for b in right)) for left, right in merges]


def _train_merges_slowly(texts: Sequence[bytes], vocab_size: int) -> list[tuple[str, str]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT, PAD], show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator((text.decode() for text in texts), trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@contextmanager
def _silence() -> Iterator[None]:
    """Hides what native code prints; stdout belongs to the caller's one JSON document."""
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        for descriptor, old in zip((1, 2), saved, strict=True):
            os.dup2(old, descriptor)
            os.close(old)


def save_trained(filesystem: pafs.FileSystem, folder: str, tokenizer_json: str) -> None:
    """Write a trained tokeniser as a folder that AutoTokenizer loads."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "pad_token": PAD,
              "clean_up_tokenization_spaces": False, "model_max_length": 10**30}
    write_bytes(filesystem, f"{folder}/{TOKENIZER_JSON}", tokenizer_json.encode(), durable=False)
    write_bytes(filesystem, f"{folder}/tokenizer_config.json", _dump(config), durable=False)


def copy_tokenizer(place: str, filesystem: pafs.FileSystem, folder: str) -> None:
    """Copy a tokeniser folder; slow files are turned into a tokenizer.json where transformers can."""
    files = read_tokenizer_files(place)
    if TOKENIZER_JSON not in files:
        files = _convert(files, place)
    for name, content in sorted(files.items()):
        write_bytes(filesystem, f"{folder}/{name}", content, durable=False)


def read_tokenizer_files(place: str) -> dict[str, bytes]:
    """The files of a tokeniser folder by name. Raises CorpusError if it is no such folder."""
    filesystem, path = open_filesystem(place)
    rule = "a Hugging Face tokeniser folder holds tokenizer.json, or the files of a slow tokeniser"
    if filesystem.get_file_info(path).type != pafs.FileType.Directory:
        raise CorpusError("tokenizer.path", f"{shown(place)} is no folder", rule, "or train one: {train: byte_bpe}")
    names = [name for name in list_files(filesystem, path) if name in TOKENIZER_FILES]
    if not set(names) & set(VOCABULARY_FILES):
        found = ", ".join(sorted(list_files(filesystem, path))[:8]) or "nothing"
        raise CorpusError("tokenizer.path", f"{shown(place)} holds no tokeniser, but {found}", rule)
    return {name: read_bytes(filesystem, f"{path}/{name}") for name in sorted(names)}


def _convert(files: dict[str, bytes], place: str) -> dict[str, bytes]:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as given, tempfile.TemporaryDirectory() as made:
        for name, content in files.items():
            with open(os.path.join(given, name), "wb") as stream:
                stream.write(content)
        try:
            AutoTokenizer.from_pretrained(given).save_pretrained(made)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise CorpusError("tokenizer.path", f"{shown(place)} cannot be loaded ({error})",
                              "transformers' AutoTokenizer must load it",
                              "add a tokenizer_config.json that names its tokenizer_class") from error
        return files | {name: _read(os.path.join(made, name)) for name in os.listdir(made) if name in TOKENIZER_FILES}


def _read(path: str) -> bytes:
    with open(path, "rb") as stream:
        return stream.read()


def _dump(tree: Any) -> bytes:
    return (json.dumps(tree, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()


# --- encoding ---


class Encoder:
    """Texts → ids, without special tokens around them. `name` says by what."""

    def __init__(self, files: dict[str, bytes], name: str) -> None:
        self.name = name
        self._encode = {"gigatoken": _gigatoken, "tokenizers": _tokenizers, "transformers": _transformers}[name](files)

    def encode(self, texts: pa.Array) -> tuple[npt.NDArray[np.uint32], Ints]:
        """Ids of the texts (large_string) end to end, and the number of ids of each."""
        if not len(texts):
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        ids, lengths = self._encode(texts)
        return ids, lengths


@lru_cache(maxsize=2)
def load_encoder(folder: str, name: str) -> Encoder:
    """The encoder of a tokeniser folder (path or URI), once a process."""
    return Encoder(read_tokenizer_files(folder), name)


@lru_cache(maxsize=2)
def load_decoder(folder: str) -> Any:
    """The `tokenizers.Tokenizer` of a folder, once a process; None for one that has only slow files."""
    files = read_tokenizer_files(folder)
    return _load_fast(files) if TOKENIZER_JSON in files else None


def _gigatoken(files: dict[str, bytes]) -> Any:
    import awkward as ak  # type: ignore[import-untyped]
    import gigatoken

    tokenizer = gigatoken.Tokenizer.from_json(files[TOKENIZER_JSON])

    def encode(texts: pa.Array) -> tuple[npt.NDArray[np.uint32], Ints]:
        _, offsets, data = texts.buffers()
        bounds = np.frombuffer(offsets, np.int64)[texts.offset:texts.offset + len(texts) + 1]
        content = np.frombuffer(data, np.uint8) if data is not None and data.size else np.empty(0, np.uint8)
        batch = ak.Array(ak.contents.ListOffsetArray(
            ak.index.Index64(bounds), ak.contents.NumpyArray(content, parameters={"__array__": "char"}),
            parameters={"__array__": "string"}))
        # One thread: Ray gives a task one CPU.
        layout = ak.to_layout(tokenizer.encode_batch(batch, parallel=False))
        ends = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[ends[0]:ends[-1]], np.diff(ends)

    return encode


def _tokenizers(files: dict[str, bytes]) -> Any:
    tokenizer = _load_fast(files)

    def encode(texts: pa.Array) -> tuple[npt.NDArray[np.uint32], Ints]:
        ids: list[npt.NDArray[np.uint32]] = []
        for start in range(0, len(texts), 256):
            batch = tokenizer.encode_batch_fast(texts[start:start + 256].to_pylist(), add_special_tokens=False)
            ids += [np.array(item.ids, np.uint32) for item in batch]
        return np.concatenate(ids), np.array([len(item) for item in ids], np.int64)

    return encode


def _transformers(files: dict[str, bytes]) -> Any:
    tokenizer = _load_slow(files)

    def encode(texts: pa.Array) -> tuple[npt.NDArray[np.uint32], Ints]:
        ids = [np.array(tokenizer.encode(text, add_special_tokens=False), np.uint32) for text in texts.to_pylist()]
        return np.concatenate(ids), np.array([len(item) for item in ids], np.int64)

    return encode


def _load_fast(files: dict[str, bytes]) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(files[TOKENIZER_JSON].decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _load_slow(files: dict[str, bytes]) -> Any:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            with open(os.path.join(folder, name), "wb") as stream:
                stream.write(content)
        return AutoTokenizer.from_pretrained(folder)


def describe(files: dict[str, bytes], sample: Sequence[str], needs_end: bool) -> TokenizerInfo:
    """Ids and encoder of a tokeniser; `sample`: real documents for the check of gigatoken. Raises CorpusError."""
    if TOKENIZER_JSON in files:
        tokenizer = _load_fast(files)
        names = tokenizer.get_vocab(with_added_tokens=True)
        encode = lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids  # noqa: E731
    else:
        tokenizer = _load_slow(files)
        names = tokenizer.get_vocab()
        encode = lambda text, special: tokenizer.encode(text, add_special_tokens=special)  # noqa: E731
    special = _special_tokens(files)
    ends = (special.get("eos_token"), *KNOWN_ENDS, special.get("sep_token"))
    end = next((names[name] for name in ends if name in names), None)
    if needs_end and end is None:
        raise CorpusError("tokenizer.path", "the tokeniser has no end-of-text token", "packed documents end with one",
                          "name it as eos_token in tokenizer_config.json")
    pad = names.get(special.get("pad_token", ""), names.get(PAD, names.get("[PAD]", end if end is not None else 0)))
    prefix, suffix = _template(encode)
    encoder = _choose_encoder(files, sample)
    return TokenizerInfo(max(names.values()) + 1, pad, end, encoder, prefix, suffix)


def _special_tokens(files: dict[str, bytes]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in json.loads(files.get(name, b"{}")).items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                found[key] = content
    return found


def _template(encode: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokeniser puts around a single text."""
    bare, dressed = encode("word", False), encode("word", True)
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start:start + len(bare)] == bare:
            return tuple(dressed[:start]), tuple(dressed[start + len(bare):])
    return (), ()


def _choose_encoder(files: dict[str, bytes], sample: Sequence[str]) -> str:
    """gigatoken if its ids equal the Hugging Face tokeniser's on the sample and on awkward cases."""
    if TOKENIZER_JSON not in files:
        return "transformers"
    checked: list[str] = list(PROBES)
    size = 0
    for text in sample:
        if size >= CHECK_BYTES:
            break
        checked.append(text[:100_000])
        size += len(checked[-1])
    texts = pa.array(checked, pa.large_string())
    try:
        ours, our_lengths = Encoder(files, "gigatoken").encode(texts)
    except Exception:  # Whatever the fast path stumbles over, the reference encoder takes its place.
        return "tokenizers"
    ids, lengths = Encoder(files, "tokenizers").encode(texts)
    return "gigatoken" if np.array_equal(lengths, our_lengths) and np.array_equal(ids, ours) else "tokenizers"


def append_token(ids: npt.NDArray[np.uint32], lengths: Ints, token: int, dtype: str) -> tuple[Tokens, Ints]:
    """The documents' ids with a token after each, in the given type."""
    ends = np.cumsum(lengths + 1)
    out = np.empty(len(ids) + len(lengths), dtype)
    inside = np.ones(len(out), bool)
    inside[ends - 1] = False
    out[inside] = ids
    out[ends - 1] = token
    return out, lengths + 1
