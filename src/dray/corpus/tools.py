"""What a task encodes documents with: the tokeniser in a folder, and numbers of names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dray.corpus.manifest import Manifest
from dray.corpus.packing import Ints
from dray.corpus.tokenizer_folder import (
    all_special_tokens,
    find_chat_template,
    special_tokens,
)
from dray.corpus.tokenizing import (
    TokenizerInfo,
    find_word_starts,
    load_decoder,
    load_encoder,
    read_tokenizer_files,
)
from dray.errors import CorpusError
from dray.storage.filesystem import (
    child,
    open_filesystem,
    parent,
    read_bytes,
    write_bytes,
)
from dray.tasks import Task

FILES = "files"
"""Where a corpus keeps the files that its task goes by, beside its tokeniser."""


def keep_files(files: Mapping[str, bytes], folder: str) -> None:
    """Put what a task goes by into a corpus."""
    for name, content in files.items():
        filesystem, path = open_filesystem(child(folder, FILES, name))
        write_bytes(filesystem, path, content, durable=False)


def with_kept_files(task: Task, folder: str) -> Task:
    """The task with its files as a corpus, or a run, keeps them."""
    return task.reading({name: child(folder, FILES, name) for name in task.files})


@lru_cache(maxsize=16)
def _read_kept(place: str) -> bytes:
    return read_bytes(*open_filesystem(place))


def tokenizer_of(manifest: Manifest) -> TokenizerInfo:
    """What a manifest knows of its corpus' tokeniser, with the encoder that its rows were made
    by."""
    return TokenizerInfo(
        manifest.vocab_size,
        manifest.pad_token_id,
        manifest.eos_token_id,
        manifest.encoder,
        manifest.prefix or (),
        manifest.suffix or (),
        manifest.middle,
        manifest.mask_token_id,
    )


class Tools:
    """What a task encodes documents with, by the tokeniser in a folder of a corpus or a run."""

    def __init__(
        self, folder: str, info: TokenizerInfo, row_tokens: int, names: Sequence[str] = ()
    ) -> None:
        """`names`: those whose numbers are known already, in the order of these."""
        self.prefix, self.middle, self.suffix = info.prefix, info.middle, info.suffix
        self.row_tokens, self.dtype = row_tokens, info.dtype
        self._folder, self._info = folder, info
        self.names = {name: number for number, name in enumerate(names)}
        """Numbers of the names met so far."""
        self.counts: Counter[str] = Counter()

    @cached_property
    def _encoder(self) -> Any:
        return load_encoder(self._folder, self._info.encoder)

    def encode(self, texts: pa.Array) -> tuple[npt.NDArray[np.uint32], Ints]:
        found: tuple[npt.NDArray[np.uint32], Ints] = self._encoder.encode(texts)
        return found

    def encode_words(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        tokenizer = load_decoder(self._folder)
        if not hasattr(tokenizer, "encode_batch"):  # transformers' slow ones know no places
            raise CorpusError(
                "tokenizer.path",
                "the tokeniser does not tell which word a token is of",
                "tokens of words need a tokenizer.json",
                "convert the tokeniser to a fast one",
            )
        found = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(item.ids, [start for start, _ in item.offsets]) for item in found]

    @cached_property
    def _files(self) -> Mapping[str, bytes]:
        return read_tokenizer_files(self._folder)

    @cached_property
    def chat_template(self) -> str | None:
        return find_chat_template(self._files)

    @cached_property
    def roles(self) -> Mapping[str, str]:
        return special_tokens(self._files)

    @cached_property
    def special(self) -> frozenset[str]:
        return all_special_tokens(self._files)

    @cached_property
    def unknown(self) -> int | None:
        """The id of what stands for all that the vocabulary lacks, where it has one."""
        text = self.roles.get("unk_token")
        if text is None:
            return None
        decoder = load_decoder(self._folder)
        find = getattr(decoder, "token_to_id", None) or decoder.convert_tokens_to_ids
        found = find(text)
        return None if found is None else int(found)

    @cached_property
    def word_starts(self) -> npt.NDArray[np.uint8]:
        return find_word_starts(self._files, self._info.vocab_size)

    def number(self, names: pa.Array) -> npt.NDArray[np.int32]:
        """Numbers of names, which are counted; -1 for null."""
        encoded = names.dictionary_encode()
        met = encoded.dictionary.to_pylist()
        own = [self.names.setdefault(name, len(self.names)) for name in met]
        places = encoded.indices.fill_null(len(own)).to_numpy()
        found: npt.NDArray[np.int32] = np.array([*own, -1], np.int32)[places]
        for name, count in zip(met, np.bincount(places, minlength=len(met)), strict=False):
            self.counts[name] += int(count)
        return found

    def file(self, name: str) -> bytes:
        return _read_kept(child(parent(self._folder), FILES, name))
