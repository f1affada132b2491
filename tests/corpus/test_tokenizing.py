"""Tokenisers: trained the same every time, loaded by transformers, encoded by whatever gives the reference's ids."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import fs as pafs

from dray.corpus import tokenizing
from dray.corpus.tokenizing import (
    END_OF_TEXT,
    PAD,
    Encoder,
    append_token,
    copy_tokenizer,
    describe,
    read_tokenizer_files,
    save_trained,
    train_byte_bpe,
)
from dray.errors import CorpusError

LOCAL = pafs.LocalFileSystem()
TEXT = Path(json.__file__).read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    save_trained(LOCAL, str(folder), train_byte_bpe([TEXT.encode(), "漢字 é".encode()], 400))
    return folder


def encode(encoder: Encoder, *texts: str) -> list[list[int]]:
    ids, lengths = encoder.encode(pa.array(texts, pa.large_string()))
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def test_training_gives_the_same_bytes_in_another_process(trained: Path) -> None:
    program = ("import hashlib, json; from pathlib import Path; from dray.corpus.tokenizing import train_byte_bpe;"
               "text = Path(json.__file__).read_bytes();"
               "print(hashlib.sha256(train_byte_bpe([text, '漢字 é'.encode()], 400).encode()).hexdigest())")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # Nothing but that line: native code must not write on stdout.
    assert result.stdout.strip() == hashlib.sha256((trained / "tokenizer.json").read_bytes()).hexdigest()


def test_gigatoken_makes_hugging_faces_merges() -> None:
    texts = [TEXT.encode(), b"a b c d e", "é漢".encode() * 5]
    assert tokenizing._train_merges(texts, 500) == tokenizing._train_merges_slowly(texts, 500)


def test_the_vocabulary_has_the_wanted_size_special_tokens_included(trained: Path) -> None:
    files = read_tokenizer_files(str(trained))
    info = describe(files, [TEXT], needs_end=True)
    assert (info.vocab_size, info.eos_token_id, info.pad_token_id) == (400, 0, 1)
    assert (info.prefix, info.suffix, info.encoder, info.dtype) == ((), (), "gigatoken", "uint16")


def test_nothing_to_train_on_gives_bytes_alone() -> None:
    vocab = json.loads(train_byte_bpe([], 300))["model"]["vocab"]
    assert len(vocab) == 258


def test_transformers_loads_what_was_trained_and_gives_the_same_ids(trained: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(trained))
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == (END_OF_TEXT, PAD, 400)
    texts = [TEXT[:3000], "x" + END_OF_TEXT + "y", " 漢字\n\n\té  ", "don't"]
    for name in ("gigatoken", "tokenizers"):
        ours = encode(Encoder(read_tokenizer_files(str(trained)), name), *texts)
        assert ours == [tokenizer.encode(text) for text in texts]
    assert tokenizer.decode(ours[2]) == texts[2]


def test_slices_encode_like_their_documents(trained: Path) -> None:
    encoder = Encoder(read_tokenizer_files(str(trained)), "gigatoken")
    texts = pa.array(["one", "", "two three", "four"], pa.large_string())
    ids, lengths = encoder.encode(texts.slice(1, 2))
    assert lengths[0] == 0
    assert ids.tolist() == encode(encoder, "two three")[0]
    assert len(encoder.encode(texts.slice(0, 0))[0]) == 0


def make_wordpiece(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocab = {name: index for index, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "wor", "##d", "a", "b"])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    around = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=around)
    tokenizer.enable_truncation(3)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "sep_token": {"content": "[SEP]"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_what_gigatoken_cannot_do_falls_back(tmp_path: Path) -> None:
    files = read_tokenizer_files(str(make_wordpiece(tmp_path / "wordpiece")))
    info = describe(files, ["a word b"], needs_end=True)
    assert (info.encoder, info.prefix, info.suffix) == ("tokenizers", (2,), (3,))
    assert (info.pad_token_id, info.eos_token_id, info.vocab_size) == (0, 3, 8)
    # The folder's own truncation is not wanted: dray cuts rows itself.
    assert encode(Encoder(files, "tokenizers"), "a word b a") == [[6, 4, 5, 7, 6]]


def test_a_difference_on_real_documents_rules_gigatoken_out(trained: Path, tmp_path: Path) -> None:
    tree = json.loads((trained / "tokenizer.json").read_text())
    tree["normalizer"] = {"type": "Lowercase"}
    files = {"tokenizer.json": json.dumps(tree).encode()}
    info = describe(files, ["SHOUTING ÉÀ"], needs_end=True)
    chosen = Encoder(files, info.encoder)
    assert encode(chosen, "SHOUTING ÉÀ") == encode(Encoder(files, "tokenizers"), "shouting éà")


def test_slow_files_are_converted(tmp_path: Path, shared_data: Path) -> None:
    slow = tmp_path / "gpt2"
    slow.mkdir()
    source = shared_data / "gpt2_vocab"
    (slow / "vocab.json").write_bytes((source / "encoder.json").read_bytes())
    (slow / "merges.txt").write_bytes((source / "vocab.bpe").read_bytes())
    (slow / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    copy_tokenizer(str(slow), LOCAL, str(tmp_path / "copy"))
    files = read_tokenizer_files(str(tmp_path / "copy"))
    info = describe(files, [TEXT], needs_end=True)
    assert (info.vocab_size, info.eos_token_id, info.encoder) == (50257, 50256, "gigatoken")
    assert encode(Encoder(files, "gigatoken"), "Hello world") == [[15496, 995]]


@pytest.mark.parametrize(("names", "what"), [
    (None, "is no folder"),
    (["README.md"], "holds no tokeniser, but README.md"),
    (["tokenizer_config.json"], "holds no tokeniser"),
])
def test_refusals(tmp_path: Path, names: list[str] | None, what: str) -> None:
    folder = tmp_path / "folder"
    if names is not None:
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
    with pytest.raises(CorpusError, match=what):
        read_tokenizer_files(str(folder))


def test_packing_needs_a_token_that_ends_documents(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    files = {"tokenizer.json": Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).to_str().encode()}
    with pytest.raises(CorpusError, match="no end-of-text token"):
        describe(files, [], needs_end=True)
    assert describe(files, [], needs_end=False).eos_token_id is None


def test_append_token_ends_every_document() -> None:
    tokens, lengths = append_token(np.array([5, 6, 7], np.uint32), np.array([2, 0, 1]), 9, "uint16")
    assert (tokens.tolist(), lengths.tolist(), tokens.dtype) == ([5, 6, 9, 9, 7, 9], [3, 1, 2], np.uint16)
