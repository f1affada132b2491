"""Where a tokeniser's chat template is found, and which of its tokens no text is made of."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from transformers import AutoTokenizer

from dray.corpus.tokenizer_folder import (
    Dress,
    all_special_tokens,
    dressed,
    find_chat_template,
)
from dray.corpus.tokenizing import (
    describe,
    load_encoder,
    read_tokenizer_files,
    save_trained,
    train_byte_bpe,
)

TEXT = "a small text that is trained on"


def trained(folder: Path) -> dict[str, bytes]:
    content = train_byte_bpe([TEXT.encode()], 300, marks=["<|turn|>"])
    save_trained(pafs.LocalFileSystem(), str(folder), content, ["<|turn|>"])
    return read_tokenizer_files(str(folder))


@pytest.mark.parametrize(
    ("setting", "file", "found"),
    [
        (None, None, None),
        ("one", None, "one"),
        ("one", "two", "two"),  # a file goes before a setting, as transformers has it
        ([{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}], None, "yes"),
        ([{"name": "rag", "template": "no"}], None, None),
    ],
)
def test_a_template_is_a_file_or_a_setting(
    setting: object, file: str | None, found: str | None
) -> None:
    files = {"tokenizer_config.json": json.dumps({"chat_template": setting}).encode()}
    files |= {} if file is None else {"chat_template.jinja": file.encode()}
    assert find_chat_template(files) == found


def test_a_tasks_marks_are_special_to_whoever_reads_the_folder(tmp_path: Path) -> None:
    files = trained(tmp_path)
    assert all_special_tokens(files) == {"<|endoftext|>", "<|pad|>", "<|turn|>"}
    info = describe(files, [TEXT], needs_end=True)
    assert info.vocab_size <= 300
    encoder = load_encoder(str(tmp_path), info.encoder)
    ids, _ = encoder.encode(pa.array([f"<|turn|>{TEXT}"], pa.large_string()))
    assert ids[0] == 2
    out = tmp_path / "out"
    out.mkdir()
    dress = Dress((), (), info.pad_token_id, info.eos_token_id, "NFC", 64)
    given = {**files, "chat_template.jinja": b"{{ messages[0].content }}"}
    for name, content in dressed(given, dress).items():
        (out / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer(f"<|turn|>{TEXT}").input_ids == ids.tolist()
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    messages = [{"role": "user", "content": TEXT}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == TEXT
