"""The tokeniser of a corpus: from a Hugging Face folder, or trained; and the encoder that turns
text into ids.

gigatoken encodes only where a check on real documents of this corpus proves that its ids equal
those of the Hugging Face tokeniser; else `tokenizers` does, or transformers for tokenisers without
a tokenizer.json. Refuses folders without a tokeniser, and tokenisers without a token that can end a
packed document, or pad a row of its own.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import fs as pafs

from dray.corpus.tokenizer_folder import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    Files,
    completed,
    dump_json,
    from_byte_level_files,
    load_tokenizer,
    read_json,
    special_tokens,
)
from dray.errors import CorpusError, caught, first_line
from dray.processes.imports import whole
from dray.storage.filesystem import list_files, open_filesystem, read_bytes, shown, write_bytes

PAD, MASK = "<|pad|>", "<|mask|>"
VOCABULARY_FILES = (
    TOKENIZER_JSON,
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
)
OLD_NAMES = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}
"""How GPT-2's files were first called."""
KNOWN_PADS = (PAD, "[PAD]", "<pad>")
KNOWN_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]", "<|im_end|>")
PROBES = (
    "",
    " ",
    "\n\n  x",
    "don't we'll I'M",
    "123 ١٢٣ 漢字\u3000😀\u00a0x e\u0301",
    "\r\n\t \t",
    "a" * 300,
    "0123456789" * 20,
    f"a{END_OF_TEXT}b {PAD}",
    "</s> <s> [SEP] <|im_start|>",
    "def f(x):\n    return x ** 2  # …",
    "\ufb01 A\u030a \u212b",
)
"""Awkward cases, besides real documents."""
FEW_DOCUMENTS = 20_000
"""What a process encodes one by one before it imports awkward, which takes many at once and half a
second of CPU."""
CHECK_BYTES = 400_000
"""Text of real documents on which gigatoken must agree."""

EncodeOne = Callable[[str, bool], list[int]]
"""Ids of a text, with or without what the tokeniser puts around it."""
Tokens = npt.NDArray[np.unsignedinteger]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenizerInfo:
    """What the rest of the corpus must know of a tokeniser."""

    vocab_size: int
    """One more than the largest id."""
    pad_token_id: int | None
    """None for packed rows under a tokeniser that has no such token: their padding is never looked
    at."""
    eos_token_id: int | None
    encoder: str
    prefix: tuple[int, ...]
    """Ids before each document: what the tokeniser puts before a text (such as [CLS])."""
    suffix: tuple[int, ...]
    """Ids after each document: the end of a packed one, else what the tokeniser puts there, or the
    end."""
    middle: tuple[int, ...] = ()
    """Ids between two texts of one document."""
    mask_token_id: int | None = None
    """What stands in a token's place where it is to be guessed."""

    @property
    def filler(self) -> int:
        """What fills a row behind its tokens."""
        return next((i for i in (self.pad_token_id, self.eos_token_id) if i is not None), 0)

    @property
    def dtype(self) -> str:
        return "uint16" if self.vocab_size <= 2**16 else "uint32"


NO_TOKENIZER = TokenizerInfo(0, None, None, "none", (), ())
"""Where documents are no texts."""

# --- making the folder --------------------------------------------------------------------------


def train_byte_bpe(
    texts: Sequence[bytes], vocab_size: int, *, masks: bool = False, marks: Sequence[str] = ()
) -> str:
    """A byte-level BPE tokeniser (GPT-2's splitting) as tokenizer.json; the same texts give the
    same bytes.

    Ids: end of text, pad, a mask if `masks`, further special tokens (`marks`), the 256 bytes, then
    the merges in order of their making. Texts hold no null byte.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [*[END_OF_TEXT, PAD, MASK][: 3 if masks else 2], *marks]
    merges = _train_merges(texts, vocab_size - (len(special) - 2))
    names = [*special, *alphabet, *(left + right for left, right in merges)]
    vocab = {name: index for index, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(special)
    return str(tokenizer.to_str(pretty=True))


def _train_merges(texts: Sequence[bytes], vocab_size: int) -> list[tuple[str, str]]:
    """The merges that Hugging Face's trainer makes, by gigatoken's equal but faster one where it is
    there."""
    try:
        import gigatoken
    except ImportError:
        return _train_merges_slowly(texts, vocab_size)
    with _silence():
        _, merges = gigatoken.train_bpe(
            b"\0".join(texts), vocab_size, [END_OF_TEXT, PAD], separator=b"\0"
        )
    letters = _byte_letters()
    return [
        ("".join(letters[b] for b in left), "".join(letters[b] for b in right))
        for left, right in merges
    ]


def _train_merges_slowly(texts: Sequence[bytes], vocab_size: int) -> list[tuple[str, str]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
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


def save_trained(
    filesystem: pafs.FileSystem, folder: str, tokenizer_json: str, marks: Sequence[str] = ()
) -> None:
    """Write a trained tokeniser as a folder that AutoTokenizer loads."""
    model = json.loads(tokenizer_json)["model"]
    special = {"eos_token": END_OF_TEXT, "pad_token": PAD, "mask_token": MASK}
    special |= {"unk_token": model["unk_token"]} if model.get("unk_token") else {}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{kind: name for kind, name in special.items() if name in model["vocab"]},
        **({"extra_special_tokens": list(marks)} if marks else {}),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    write_bytes(filesystem, f"{folder}/{TOKENIZER_JSON}", tokenizer_json.encode(), durable=False)
    write_bytes(filesystem, f"{folder}/{TOKENIZER_CONFIG}", dump_json(config), durable=False)


def copy_tokenizer(place: str, filesystem: pafs.FileSystem, folder: str) -> None:
    """Copy a tokeniser folder; slow files are turned into a tokenizer.json where transformers can.
    Raises CorpusError.

    Tokens that only stand beside tokenizer.json are put into it.
    """
    files = read_tokenizer_files(place)
    if TOKENIZER_JSON not in files:
        files = _convert(files, place)
    if TOKENIZER_JSON in files:
        files = completed(files)
    for name, content in sorted(files.items()):
        write_bytes(filesystem, f"{folder}/{name}", content, durable=False)


def read_tokenizer_files(place: str) -> dict[str, bytes]:
    """The files of a tokeniser folder by name. Raises CorpusError if it is no such folder."""
    filesystem, path = open_filesystem(place)
    rule = "a Hugging Face tokeniser folder holds tokenizer.json, or the files of a slow tokeniser"
    if filesystem.get_file_info(path).type != pafs.FileType.Directory:
        raise CorpusError(
            "tokenizer.path",
            f"{shown(place)} is no folder",
            rule,
            "or train one: {train: byte_bpe}",
        )
    there = list_files(filesystem, path)
    names = {name: name for name in there if name in TOKENIZER_FILES}
    names = {new: old for old, new in OLD_NAMES.items() if old in there} | names
    if not set(names) & set(VOCABULARY_FILES):
        found = ", ".join(sorted(there)[:8]) or "nothing"
        raise CorpusError("tokenizer.path", f"{shown(place)} holds no tokeniser, but {found}", rule)
    return {name: read_bytes(filesystem, f"{path}/{names[name]}") for name in sorted(names)}


def _convert(files: Files, place: str) -> Files:
    """Slow files with a tokenizer.json made of them: by transformers, or as GPT-2's where nothing
    names their class."""
    filesystem, path = open_filesystem(place)
    beside = [
        name for name in list_files(filesystem, path) if name == "config.json"
    ]  # names the model's type
    model = {name: read_bytes(filesystem, f"{path}/{name}") for name in beside}
    named = "tokenizer_class" in read_json(files, TOKENIZER_CONFIG) or model
    if not named and {"vocab.json", "merges.txt"} <= files.keys():
        return from_byte_level_files(files, shown(place))
    with tempfile.TemporaryDirectory() as made:
        _, error = caught(lambda: _load_slow(files | model).save_pretrained(made))
        if error is not None:  # transformers' own, the system's, or of any library it calls
            raise CorpusError(
                "tokenizer.path",
                f"{shown(place)} cannot be loaded ({first_line(error)})",
                "transformers' AutoTokenizer must load it",
                f"add a {TOKENIZER_CONFIG} that names its tokenizer_class, or a {TOKENIZER_JSON}",
            ) from error
        return files | {
            name: _read(os.path.join(made, name))
            for name in os.listdir(made)
            if name in TOKENIZER_FILES
        }


def _read(path: str) -> bytes:
    with open(path, "rb") as stream:
        return stream.read()


# --- encoding -----------------------------------------------------------------------------------


class Encoder:
    """Texts → ids, without special tokens around them. `name` says by what."""

    def __init__(self, files: dict[str, bytes], name: str) -> None:
        self.name = name
        self._encode = {
            "gigatoken": _gigatoken,
            "tokenizers": _tokenizers,
            "transformers": _transformers,
        }[name](files)

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
    """What decodes the ids of a folder's tokeniser, once a process: of tokenizers, or of
    transformers."""
    files = read_tokenizer_files(folder)
    return _load_fast(files) if TOKENIZER_JSON in files else _load_slow(files)


@dataclass(frozen=True)
class Decoder:
    """Ids as text, without special tokens, by the tokeniser in a folder: it may be sent anywhere,
    and reads that where it is called."""

    folder: str

    def __call__(self, ids: Sequence[int]) -> str:
        return str(load_decoder(self.folder).decode(list(ids), skip_special_tokens=True))


@lru_cache(maxsize=2)
def token_names(folder: str) -> tuple[str, ...]:
    """The tokens of a folder's tokeniser by id, once a process; ids without one are empty."""
    vocabulary = load_decoder(folder).get_vocab()
    names = [""] * (max(vocabulary.values()) + 1)
    for name, index in vocabulary.items():
        names[index] = name
    return tuple(names)


def _gigatoken(files: dict[str, bytes]) -> Any:
    import gigatoken

    tokenizer = gigatoken.Tokenizer.from_json(files[TOKENIZER_JSON])
    num_done = 0

    def encode(texts: pa.Array) -> tuple[npt.NDArray[np.uint32], Ints]:
        nonlocal num_done
        _, offsets, data = texts.buffers()
        bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
        content = (
            np.frombuffer(data, np.uint8)
            if data is not None and data.size
            else np.empty(0, np.uint8)
        )
        num_done += len(texts)
        if num_done <= FEW_DOCUMENTS:
            ids = [
                tokenizer.encode(content[start:stop].tobytes())
                for start, stop in pairwise(bounds.tolist())
            ]
            return np.concatenate(ids), np.fromiter(map(len, ids), np.int64, len(ids))
        return _encode_at_once(tokenizer, bounds, content)

    return encode


def _encode_at_once(
    tokenizer: Any, bounds: Ints, content: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.uint32], Ints]:
    """Documents in one call, which takes and gives awkward arrays."""
    import awkward as ak  # type: ignore[import-untyped]

    batch = ak.Array(
        ak.contents.ListOffsetArray(
            ak.index.Index64(bounds),
            ak.contents.NumpyArray(content, parameters={"__array__": "char"}),
            parameters={"__array__": "string"},
        )
    )
    # One thread: Ray gives a task one CPU.
    layout = ak.to_layout(tokenizer.encode_batch(batch, parallel=False))
    ends = np.asarray(layout.offsets.data)
    return np.asarray(layout.content.data)[ends[0] : ends[-1]], np.diff(ends)


def _tokenizers(files: dict[str, bytes]) -> Any:
    tokenizer = _load_fast(files)

    def encode(texts: pa.Array) -> tuple[npt.NDArray[np.uint32], Ints]:
        ids: list[npt.NDArray[np.uint32]] = []
        for start in range(0, len(texts), 256):
            batch = tokenizer.encode_batch_fast(
                texts[start : start + 256].to_pylist(), add_special_tokens=False
            )
            ids += [np.array(item.ids, np.uint32) for item in batch]
        return np.concatenate(ids), np.array([len(item) for item in ids], np.int64)

    return encode


def _transformers(files: dict[str, bytes]) -> Any:
    tokenizer = _load_slow(files)

    def encode(texts: pa.Array) -> tuple[npt.NDArray[np.uint32], Ints]:
        ids = [
            np.array(tokenizer.encode(text, add_special_tokens=False), np.uint32)
            for text in texts.to_pylist()
        ]
        return np.concatenate(ids), np.array([len(item) for item in ids], np.int64)

    return encode


def _load_fast(files: dict[str, bytes]) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return load_tokenizer(files)


def _load_slow(files: dict[str, bytes]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            with open(os.path.join(folder, name), "wb") as stream:
                stream.write(content)
        return load_auto_tokenizer(folder)


def load_auto_tokenizer(folder: str) -> Any:
    """What transformers makes of a local folder; code that it holds is not run."""
    return whole("transformers").AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )


def describe(files: dict[str, bytes], sample: Sequence[str], needs_end: bool) -> TokenizerInfo:
    """What is to know of a tokeniser, for packed rows (`needs_end`) or one document a row. Raises
    CorpusError.

    `sample`: real documents, on which gigatoken is checked, and on which no pad token may be a
    word.
    """
    tokenizer = _load_fast(files) if TOKENIZER_JSON in files else _load_slow(files)
    encode = partial(_encode_one, tokenizer)
    names, special = tokenizer.get_vocab(), special_tokens(files)
    ends = (special.get("eos_token"), *KNOWN_ENDS, special.get("sep_token"))
    end = next((names[name] for name in ends if name in names), None)
    pads = [
        names[name]
        for name in (special.get("pad_token"), *KNOWN_PADS)
        if name in names and name != special.get("unk_token")
    ]
    prefix, suffix = _template(encode, sample)
    if needs_end:
        if end is None:
            raise CorpusError(
                "tokenizer.path",
                "the tokeniser has no end-of-text token",
                "packed documents end with one",
                f"name it as eos_token in {TOKENIZER_CONFIG}",
            )
        pad = next((pad for pad in pads if not _is_word(pad, encode, sample)), None)
        suffix = (end,)
    else:
        pad = next((pad for pad in pads if not _is_word(pad, encode, sample)), end)
        if pad is None:
            raise CorpusError(
                "tokenizer.path",
                "the tokeniser has no pad token that is no word, and no end-of-text token",
                "rows are padded to one length, and a word is no padding",
                f"name one as pad_token in {TOKENIZER_CONFIG}",
            )
        if not suffix and end is not None and TOKENIZER_JSON in files:
            suffix = (end,)
    mask = special.get("mask_token")
    return TokenizerInfo(
        max(names.values()) + 1,
        pad,
        end,
        _choose_encoder(files, sample),
        prefix,
        suffix,
        _find_middle(tokenizer, prefix, suffix),
        None if mask is None else names.get(mask),
    )


def _find_middle(
    tokenizer: Any, prefix: tuple[int, ...], suffix: tuple[int, ...]
) -> tuple[int, ...]:
    """What the tokeniser puts between two texts; where it puts nothing, what ends one."""
    first, second = (_encode_one(tokenizer, text, False) for text in ("word", "other"))
    encoded = tokenizer.encode("word", "other", add_special_tokens=True)
    both = list(getattr(encoded, "ids", encoded))
    own = _encode_one(tokenizer, "word", True)
    tail = own[own.index(first[0]) + len(first) :] if first and first[0] in own else []
    inner = both[len(prefix) + len(first) : len(both) - len(second) - len(tail)]
    return tuple(inner) or suffix


def find_word_starts(files: Mapping[str, bytes], vocab_size: int) -> npt.NDArray[np.uint8]:
    """By token: 1 where it begins a word, 0 where it goes on with one, 2 where it is special.

    Byte-level and SentencePiece tokens begin a word with a space of theirs, WordPiece's unless they
    begin with `##`.
    """
    tokenizer = _load_fast(dict(files)) if TOKENIZER_JSON in files else _load_slow(dict(files))
    names = tokenizer.get_vocab()
    special = set(special_tokens(files).values()) | {END_OF_TEXT, PAD, MASK}
    hyphened = any(name.startswith("##") for name in names)
    starts = np.ones(vocab_size, np.uint8)
    for name, index in names.items():
        if name in special:
            starts[index] = 2
        elif hyphened:
            starts[index] = not name.startswith("##")
        else:
            starts[index] = name.startswith(("Ġ", "▁", "Ċ", "ĉ"))
    return starts


def _encode_one(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Ids of a text by a tokeniser of tokenizers or of transformers."""
    encoded = tokenizer.encode(text, add_special_tokens=special)
    return list(getattr(encoded, "ids", encoded))


def _template(encode: EncodeOne, sample: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokeniser puts around a single text. Raises CorpusError if it does anything else to
    one."""
    for text in ("word", "a", *sample[:10]):
        bare, around = encode(text, False), encode(text, True)
        for start in range(len(around) - len(bare) + 1):
            if bare and around[start : start + len(bare)] == bare:
                return tuple(around[:start]), tuple(around[start + len(bare) :])
    if not around:
        return (), ()
    raise CorpusError(
        "tokenizer.path",
        f"the tokeniser makes {around[:20]} of a text whose own ids are {bare[:20]}",
        "special tokens stand before and after a text",
        "use another tokeniser",
    )


def _is_word(pad: int, encode: EncodeOne, sample: Sequence[str]) -> bool:
    """Whether a token is a part of texts: of more than one in a hundred of the sample, and of more
    than one."""
    seen = sum(pad in encode(text[:10_000], False) for text in sample[:200])
    return seen > 1 and seen * 100 > min(200, len(sample))


def _choose_encoder(files: dict[str, bytes], sample: Sequence[str]) -> str:
    """gigatoken if its ids equal the Hugging Face tokeniser's on the sample and on awkward
    cases."""
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
    fast, _ = caught(lambda: Encoder(files, "gigatoken").encode(texts))
    if fast is None:  # Whatever it stumbles over, the reference encoder takes its place.
        return "tokenizers"
    ours, our_lengths = fast
    ids, lengths = Encoder(files, "tokenizers").encode(texts)
    return (
        "gigatoken"
        if np.array_equal(lengths, our_lengths) and np.array_equal(ids, ours)
        else "tokenizers"
    )
