"""A tokeniser's folder made whole, and dressed so that plain transformers gives the ids that
training gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dray.corpus.cleaning import normalize
from dray.corpus.tokenizer_folder import Dress, completed, dressed
from dray.corpus.tokenizing import (
    END_OF_TEXT,
    PAD,
    PROBES,
    Encoder,
    describe,
    load_auto_tokenizer,
    train_byte_bpe,
)

TEXT = Path(json.__file__).read_text()
TEXTS = (*PROBES, "cafe\u0301 and café", "<s>x</s> [SEP] [PAD] <unk> <mask> <|user|>", TEXT[:500])
Files = dict[str, bytes]


def as_files(tokenizer: Any, **config: Any) -> Files:
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def surrounded(tokenizer: Any, template: str, *names: str) -> Any:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )
    return tokenizer


def byte_bpe(*special: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=[*special],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


@cache
def trained() -> Files:
    return {
        "tokenizer.json": train_byte_bpe([TEXT.encode()], 330).encode(),
        "tokenizer_config.json": json.dumps({"eos_token": END_OF_TEXT, "pad_token": PAD}).encode(),
    }


@cache
def begins_with_a_token() -> Files:
    tokenizer = surrounded(byte_bpe("<s>", "</s>"), "<s> $A", "<s>")
    return as_files(
        tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        add_bos_token=True,
        add_eos_token=True,
        tokenizer_class="LlamaTokenizer",
        padding_side="left",
        legacy=False,
    )


@cache
def sentence_pieces() -> Files:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.UnigramTrainer(
            vocab_size=200,
            special_tokens=["<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    surrounded(tokenizer, "$A </s>", "</s>")
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    return as_files(
        tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=5
    )


def words_with_odd_tokens() -> Files:
    """Roles for words that are no special tokens, a pad token that is not there, tokens in three
    more files."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*dict.fromkeys(["[UNK]", "</s>", "<mask>", "[SEP]", *TEXT.split()[:150]])]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    files = as_files(
        tokenizer,
        pad_token="[PAD]",
        eos_token={"content": "</s>", "__type": "AddedToken"},
        extra_special_tokens=["[SEP]", "<|nowhere|>"],
        chat_template="{{ messages }}",
        split_special_tokens=True,
    )
    files["added_tokens.json"] = json.dumps({"<|user|>": len(words)}).encode()
    files["special_tokens_map.json"] = json.dumps(
        {"mask_token": {"content": "<mask>", "lstrip": True}}
    ).encode()
    return files


MAKERS: list[Callable[[], Files]] = [
    trained,
    begins_with_a_token,
    sentence_pieces,
    words_with_odd_tokens,
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2", "bert", "modernbert", "roberta", "t5", "gemma", "phi3"]
)
@pytest.mark.parametrize("packs_rows", [False, True])
def test_plain_transformers_gives_trainings_ids(
    tmp_path: Path, make: Callable[[], Files], model_type: str, packs_rows: bool
) -> None:
    files = completed(make())
    info = describe(files, [TEXT[:2000]], needs_end=packs_rows)
    suffix = () if packs_rows else info.suffix
    dress = Dress(info.prefix, suffix, info.pad_token_id, info.eos_token_id, "NFC", 24)
    for name, content in dressed(files, dress).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = load_auto_tokenizer(str(tmp_path))
    encoder = Encoder(files, "tokenizers")
    for text in TEXTS:
        ids = encoder.encode(normalize(pa.array([text], pa.large_string()), "NFC"))[0].tolist()
        assert tokenizer(text, verbose=False).input_ids == [*info.prefix, *ids, *suffix]
        cut = [*info.prefix, *ids[: 24 - len(info.prefix) - len(suffix)], *suffix]
        assert tokenizer(text, truncation=True).input_ids == cut
    assert len(tokenizer) == info.vocab_size
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token_id == info.pad_token_id
    assert set(tokenizer("x")) == {"input_ids", "attention_mask"}


def test_what_is_dressed_may_be_dressed_again() -> None:
    files = completed(begins_with_a_token())
    dress = Dress((0,), (1,), 1, 1, "NFC", 24)
    once = dressed(files, dress)
    assert dressed(completed(once), dress) == once
    info = describe(once, [], needs_end=False)
    assert (info.prefix, info.suffix) == ((0,), (1,))


def test_chat_templates_stay() -> None:
    files = completed(words_with_odd_tokens()) | {"chat_template.jinja": b"{{ x }}"}
    out = dressed(files, Dress((), (), None, 1, "none", 24))
    assert out["chat_template.jinja"] == b"{{ x }}"
    config = json.loads(out["tokenizer_config.json"])
    assert (config["chat_template"], config["extra_special_tokens"]) == (
        "{{ messages }}",
        ["[SEP]"],
    )
    assert "split_special_tokens" not in config
    assert "pad_token" not in config
