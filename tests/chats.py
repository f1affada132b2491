"""Tools of a small tokeniser that tests of conversations share."""

from __future__ import annotations

from pathlib import Path

import pyarrow.fs as pafs

from dray.corpus.tokenizing import describe, read_tokenizer_files, save_trained, train_byte_bpe
from dray.corpus.tools import Tools
from dray.tasks.parts.templates import MARKS, TEMPLATES

TEXT = "what is the capital of France and who wrote the books? It is Paris. 首都是巴黎。"


def make_tools(
    folder: Path, template: str = "chatml", row_tokens: int = 64, jinja: str | None = None
) -> Tools:
    """As a corpus' tokeniser is made for conversations."""
    marks = MARKS.get(template, ())
    trained = train_byte_bpe([TEXT.encode()] * 4, 330, marks=marks)
    save_trained(pafs.LocalFileSystem(), str(folder), trained, marks)
    (folder / "chat_template.jinja").write_text(jinja or TEMPLATES[template], encoding="utf-8")
    info = describe(read_tokenizer_files(str(folder)), [TEXT], needs_end=True)
    return Tools(str(folder), info, row_tokens)
