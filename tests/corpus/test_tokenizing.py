"""Tokenisers: trained the same every time, loaded by transformers, encoded by whatever gives the
reference's ids."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import fs as pafs

from dray.corpus import tokenizing
from dray.corpus.tokenizing import (
    END_OF_TEXT,
    PAD,
    Encoder,
    copy_tokenizer,
    describe,
    read_tokenizer_files,
    save_trained,
    train_byte_bpe,
)
from dray.errors import CorpusError
from dray.tasks.parts.encoding import surround

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
    program = (
        "import hashlib, json; from pathlib import Path; from dray.corpus.tokenizing import "
        "train_byte_bpe;"
        "text = Path(json.__file__).read_bytes();"
        "print(hashlib.sha256(train_byte_bpe([text, '漢字 é'.encode()], 400).encode()).hexdigest())"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    # Nothing but that line: native code must not write on stdout.
    assert (
        result.stdout.strip()
        == hashlib.sha256((trained / "tokenizer.json").read_bytes()).hexdigest()
    )


def test_gigatoken_makes_hugging_faces_merges() -> None:
    texts = [TEXT.encode(), b"a b c d e", "é漢".encode() * 5]
    assert tokenizing._train_merges(texts, 500) == tokenizing._train_merges_slowly(texts, 500)


def test_the_vocabulary_has_the_wanted_size_special_tokens_included(trained: Path) -> None:
    files = read_tokenizer_files(str(trained))
    info = describe(files, [TEXT], needs_end=True)
    assert (info.vocab_size, info.eos_token_id, info.pad_token_id) == (400, 0, 1)
    assert (info.prefix, info.suffix, info.encoder, info.dtype) == ((), (0,), "gigatoken", "uint16")


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

    vocab = {
        name: index
        for index, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "wor", "##d", "a", "b"])
    }
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    around = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=around
    )
    tokenizer.enable_truncation(3)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "[PAD]",
        "sep_token": {"content": "[SEP]"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_documents_one_by_one_and_at_once_have_the_same_ids(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones go one by one, so that a process with few need not import awkward; slices and
    empty ones too."""
    encoder = Encoder(read_tokenizer_files(str(trained)), "gigatoken")
    texts = pa.array(
        [*tokenizing.PROBES, "word " * 999, "", "é漢字" * 50, *tokenizing.PROBES], pa.large_string()
    )
    for some in (texts, texts.slice(3, 11), texts.slice(len(texts) - 1)):
        monkeypatch.setattr(tokenizing, "FEW_DOCUMENTS", 10**9)
        ids, lengths = encoder.encode(some)
        monkeypatch.setattr(tokenizing, "FEW_DOCUMENTS", 0)
        at_once = encoder.encode(some)
        assert np.array_equal(ids, at_once[0])
        assert np.array_equal(lengths, at_once[1])
        assert (ids.dtype, lengths.dtype, lengths.sum()) == (np.uint32, np.int64, len(ids))


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


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (None, "is no folder"),
        (["README.md"], "holds no tokeniser, but README.md"),
        (["tokenizer_config.json"], "holds no tokeniser"),
    ],
)
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

    vocab = {"a": 0, "?": 1, "[PAD]": 2}
    files = {"tokenizer.json": Tokenizer(models.WordLevel(vocab, unk_token="?")).to_str().encode()}
    with pytest.raises(CorpusError, match="no end-of-text token"):
        describe(files, [], needs_end=True)
    assert describe(files, [], needs_end=False).eos_token_id is None


def test_documents_are_surrounded() -> None:
    ids, lengths = np.array([5, 6, 7], np.uint32), np.array([2, 0, 1])
    tokens, found = surround(ids, lengths, (), (9,), "uint16")
    assert (tokens.tolist(), found.tolist(), tokens.dtype) == (
        [5, 6, 9, 9, 7, 9],
        [3, 1, 2],
        np.uint16,
    )
    tokens, found = surround(ids, lengths, (1, 2), (8, 9), "uint32")
    assert tokens.tolist() == [1, 2, 5, 6, 8, 9, 1, 2, 8, 9, 1, 2, 7, 8, 9]
    assert found.tolist() == [6, 4, 5]
    assert surround(ids, lengths, (), (), "uint16")[0].tolist() == [5, 6, 7]


# --- folders of other makers --------------------------------------------------------------------


def make_word_level(words: str, **config: Any) -> dict[str, bytes]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {word: index for index, word in enumerate(words.split())}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_no_word_is_taken_for_padding() -> None:
    text = "terrible film was the good"
    for name in ("terrible", "[UNK]", "absent"):
        files = make_word_level(f"{text} [UNK]", pad_token=name, unk_token="[UNK]")
        with pytest.raises(
            CorpusError, match="no pad token that is no word, and no end-of-text token"
        ):
            describe(files, [text, text], needs_end=False)
    # Named as padding, but a word; unknown words are no padding either.
    for name in ("terrible", "[UNK]"):
        files = make_word_level(f"{text} [UNK] </s>", pad_token=name, unk_token="[UNK]")
        assert describe(files, [text, text], needs_end=False).pad_token_id == 6
        assert describe(files, [text, text], needs_end=True).pad_token_id is None
    # One text that looks like it makes no word of a padding token.
    files = make_word_level(f"{text} [UNK] </s> <pad>", pad_token="<pad>")
    assert describe(files, [text, "a <pad>"], needs_end=False).pad_token_id == 7
    info = describe(make_word_level(f"{text} [UNK] </s> <pad>"), [text], needs_end=True)
    assert (info.pad_token_id, info.eos_token_id, info.filler, info.suffix) == (7, 6, 7, (6,))


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_gpt2s_bare_files_are_read_as_transformers_reads_them(
    tmp_path: Path, shared_data: Path, names: tuple[str, str]
) -> None:
    from transformers import GPT2Tokenizer

    source = shared_data / "gpt2_vocab"
    files = {
        new: (source / old).read_bytes()
        for new, old in zip(names, ("encoder.json", "vocab.bpe"), strict=True)
    }
    copy_tokenizer(str(write(tmp_path / "bare", files)), LOCAL, str(tmp_path / "copy"))
    ours = Encoder(read_tokenizer_files(str(tmp_path / "copy")), "tokenizers")
    given = {
        "vocab.json": (source / "encoder.json").read_bytes(),
        "merges.txt": (source / "vocab.bpe").read_bytes(),
    }
    theirs = GPT2Tokenizer.from_pretrained(write(tmp_path / "slow", given))
    texts = [*tokenizing.PROBES[1:], "# # a ## b"]
    assert encode(ours, *texts) == [theirs.encode(text) for text in texts]


def test_a_config_json_names_the_class_of_slow_files(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "wor", "##d"]
    files = {"vocab.txt": "\n".join(words).encode(), "config.json": b'{"model_type": "bert"}'}
    copy_tokenizer(str(write(tmp_path / "bert", files)), LOCAL, str(tmp_path / "copy"))
    info = describe(read_tokenizer_files(str(tmp_path / "copy")), ["Word"], needs_end=False)
    assert (info.prefix, info.suffix, info.pad_token_id) == ((2,), (3,), 0)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({"tokenizer.json": b"{"}, "tokenizer.json cannot be loaded"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b""}, "lacks some of the 256 bytes"),
        ({"vocab.json": b"[1]", "merges.txt": b""}, "vocab.json holds a list"),
        ({"vocab.txt": b"a"}, "cannot be loaded"),
        (
            make_word_level("a b [UNK]") | {"tokenizer_config.json": b"{"},
            "tokenizer_config.json is broken JSON",
        ),
        (
            make_word_level("a b [UNK]") | {"added_tokens.json": b'{"b": 7}'},
            "'b' has the id 7 in one file and 1",
        ),
        (
            make_word_level("a b [UNK]") | {"added_tokens.json": b'{"<x>": 9}'},
            "'<x>' has the id 9 in one file and 3",
        ),
    ],
)
def test_broken_folders_are_one_line(tmp_path: Path, files: dict[str, bytes], what: str) -> None:
    with pytest.raises(CorpusError, match=what) as raised:
        copy_tokenizer(str(write(tmp_path / "folder", files)), LOCAL, str(tmp_path / "copy"))
    assert "\n" not in str(raised.value)


def test_tokens_that_stand_beside_the_tokenizer_are_put_into_it(tmp_path: Path) -> None:
    files = make_word_level("a b [UNK] </s>", eos_token="</s>", additional_special_tokens=["b"])
    files["added_tokens.json"] = json.dumps({"<x>": 4}).encode()
    copy_tokenizer(str(write(tmp_path / "folder", files)), LOCAL, str(tmp_path / "copy"))
    ours = Encoder(read_tokenizer_files(str(tmp_path / "copy")), "tokenizers")
    assert encode(ours, "a<x>a</s>b") == [[0, 4, 0, 3, 1]]


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    files = {
        "vocab.txt": b"a\nb",
        "tokenizer_config.json": json.dumps(config).encode(),
        "evil.py": f"open({str(ran)!r}, 'w')".encode(),
    }
    with pytest.raises(CorpusError, match="cannot be loaded"):
        copy_tokenizer(str(write(tmp_path / "folder", files)), LOCAL, str(tmp_path / "copy"))
    assert not ran.exists()
