"""Prompts with answers, as tasks share them: a record is a prompt and one or two answers, a row has
the first of them behind its prompt, and the other in a column of its own.

A batch has the sequences of each row side by side, int64 [rows, sequences, width], each padded
behind its end; only the tokens of answers, their ends included, are targets. What is too long for a
row is cut and counted: an answer at its end, down to half of the row, then a prompt at its
beginning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dray.tasks.parts.encoding import join_lists
from dray.tasks.parts.prompts import NoAnswer, write_prompt
from dray.tasks.rows import IGNORED, SEPARATOR, Encoded, Tools

if TYPE_CHECKING:
    from torch import Tensor

Ids = npt.NDArray[np.integer[Any]]
PROMPT_TOKENS, OTHER = "prompt_tokens", "other"
"""Columns: the tokens of a row before its answer, and the other answer's, its end included."""


@dataclass(frozen=True)
class Answers:
    """Prompts and answers as ids, what stands around a document left out."""

    records: list[int]
    """The records that they are of."""
    prompts: list[Ids]
    answers: list[list[Ids]]
    """Of each record: its answers in the order of the fields."""
    lost: list[int]
    """Tokens of each that its row has no room for."""
    refused: Mapping[int, str]
    room: int
    """Tokens that a row has for a prompt with an answer."""

    def without(self, refused: Mapping[int, str]) -> Answers:
        """The same without some records, which are refused, too."""
        kept = [place for place, record in enumerate(self.records) if record not in refused]
        return Answers(
            [self.records[place] for place in kept],
            [self.prompts[place] for place in kept],
            [self.answers[place] for place in kept],
            [self.lost[place] for place in kept],
            {**self.refused, **refused},
            self.room,
        )

    def encoded(self, tools: Tools, others: Sequence[Ids], **columns: Any) -> Encoded:
        """Rows of each prompt with its first answer, and `others` beside; further columns by
        name."""
        pieces = [
            np.concatenate([prompt, answers[0]])
            for prompt, answers in zip(self.prompts, self.answers, strict=True)
        ]
        ends = np.array(tools.suffix, np.int64)
        lengths = [len(prompt) + len(tools.prefix) for prompt in self.prompts]
        return Encoded(
            np.concatenate([np.empty(0, np.int64), *pieces]).astype(tools.dtype),
            np.array([len(piece) for piece in pieces], np.int64),
            {
                PROMPT_TOKENS: np.array(lengths, np.int32),
                OTHER: join_lists([np.concatenate([other, ends]) for other in others])
                if others
                else pa.array([], pa.large_list(pa.int64())),
                **{name: np.asarray(values) for name, values in columns.items()},
            },
            records=np.array(self.records, np.int64),
            num_lost=np.array(self.lost, np.int64),
            refused=self.refused,
        )


def count_answers(texts: pa.Array) -> int:
    """How many answers documents have behind their prompts: a prediction may be asked of one where
    two are learnt from."""
    return int(pc.count_substring(texts[:1], SEPARATOR)[0].as_py()) if len(texts) else 1


def encode_answers(texts: pa.Array, tools: Tools, num_answers: int) -> Answers:
    """Documents of a prompt and `num_answers` answers, each as JSON, as ids. One without a token in
    an answer is refused, as is what is no conversation."""
    room = max(0, tools.row_tokens - len(tools.prefix) - len(tools.suffix))
    written, refused = _written(texts, tools, num_answers)
    columns = [
        _split(*tools.encode(pa.array([row[place] for row in written.values()], pa.large_string())))
        for place in range(1 + num_answers)
    ]
    found = Answers([], [], [], [], refused, room)
    for record, prompt, *answers in zip(written, *columns, strict=True):
        if not all(len(answer) for answer in answers):
            refused[record] = "empty answer"
            continue
        longest = max(len(answer) for answer in answers)
        kept = min(len(prompt), max(room - longest, room // 2))
        least = room - kept
        found.records.append(record)
        found.prompts.append(prompt[len(prompt) - kept :])
        found.answers.append([answer[:least] for answer in answers])
        lost = sum(max(0, len(answer) - least) for answer in answers)
        found.lost.append(len(prompt) - kept + lost)
    return found


def _written(
    texts: pa.Array, tools: Tools, num_answers: int
) -> tuple[dict[int, list[str]], dict[int, str]]:
    """Prompts and answers as texts, by record, and why others are none."""
    found: dict[int, list[str]] = {}
    refused: dict[int, str] = {}
    for record, text in enumerate(texts.to_pylist()):
        prompt, *answers = text.split(SEPARATOR)
        try:
            asked, own = write_prompt(prompt, answers[:num_answers], tools)
            found[record] = [asked, *own]
        except NoAnswer as error:
            refused[record] = str(error)
    return found, refused


def _split(ids: Ids, lengths: npt.NDArray[np.int64]) -> list[Ids]:
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []


def answer_batch(table: pa.Table, pad_token_id: int | None) -> dict[str, Tensor]:
    """Rows with their other answers as `input_ids`, `attention_mask` and `labels`, int64 [rows, 2,
    width], and which of them are rows of the corpus, `real`, bool [rows]. labels[…, t] is the token
    at t + 1 where that is one of an answer, else IGNORED; rows that only fill up have none."""
    import torch

    from dray.tasks.parts.columns import integer_column, list_column, real_rows, token_matrix

    tokens, num_tokens = token_matrix(table), integer_column(table, "num_tokens").clamp(min=1)
    real = real_rows(table)
    before = torch.minimum(integer_column(table, PROMPT_TOKENS), num_tokens)
    others = [other.long() for other in list_column(table, OTHER)]
    other_sizes = torch.tensor([len(other) for other in others], dtype=torch.int64)
    sizes = torch.stack([num_tokens, (before + other_sizes).clamp(min=1)], dim=1)
    width = max(1, int((sizes * real[:, None]).max())) if len(real) else 1
    ids = torch.full((len(real), 2, width), pad_token_id or 0)
    room = min(width, tokens.shape[1])
    ids[:, :, :room] = tokens[:, None, :room]
    for row, other in enumerate(others):
        start = int(before[row])
        ids[row, 1, start : start + len(other)] = other[: max(0, width - start)]
    places = torch.arange(width)
    mask = places < sizes[:, :, None]
    ids = ids.masked_fill(~mask, pad_token_id or 0)
    labels = torch.full_like(ids, IGNORED)
    labels[:, :, :-1] = ids[:, :, 1:]
    inside = (places + 1 >= before[:, None, None]) & (places + 1 < sizes[:, :, None])
    labels = labels.masked_fill(~(inside & real[:, None, None]), IGNORED)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels, "real": real}


def encode_prompts(texts: pa.Array, tools: Tools, max_tokens: int) -> Encoded:
    """Documents of a prompt and what is wanted of an answer: prompts as tokens that leave room for
    `max_tokens` more, cut at their beginning and counted, and `wanted`, UTF-8 bytes. Raises
    ValueError where a row has no room for a prompt beside an answer."""
    room = tools.row_tokens - len(tools.prefix) - max(len(tools.suffix), max_tokens)
    if room < 1:
        raise ValueError(
            f"a row of {tools.row_tokens} tokens has no room for a prompt and an answer of "
            f"{max_tokens}"
        )
    written, refused = _written(texts, tools, 0)
    asked = pa.array([prompt for (prompt,) in written.values()], pa.large_string())
    prompts = _split(*tools.encode(asked))
    answers = [text.partition(SEPARATOR)[2] for text in texts.take([*written]).to_pylist()]
    wanted = [np.frombuffer(answer.encode(), np.uint8) for answer in answers]
    kept = [prompt[max(0, len(prompt) - room) :] for prompt in prompts]
    lengths = np.array([len(prompt) for prompt in kept], np.int64)
    return Encoded(
        np.concatenate([np.empty(0, np.int64), *kept]).astype(tools.dtype),
        lengths,
        {
            PROMPT_TOKENS: (lengths + len(tools.prefix)).astype(np.int32),
            "wanted": join_lists(wanted) if wanted else pa.array([], pa.large_list(pa.uint8())),
        },
        records=np.array(list(written), np.int64),
        num_lost=np.array([len(prompt) for prompt in prompts], np.int64) - lengths,
        refused=refused,
    )


def prompt_batch(table: pa.Table, pad_token_id: int | None, beside: str) -> dict[str, Tensor]:
    """The prompts of rows without what ends a document, as `prompts` and `mask`, int64 [rows,
    width], padded before their beginning; the varying column `beside`, int64 [rows, most], -1
    behind its numbers; and `real`, bool [rows]. An empty prompt is one pad token."""
    import torch

    from dray.tasks.parts.columns import integer_column, list_column, real_rows, token_matrix

    tokens, real = token_matrix(table), real_rows(table)
    sizes = integer_column(table, PROMPT_TOKENS).clamp(min=1)
    width = max(1, int((sizes * real).max())) if len(real) else 1
    sizes = sizes.clamp(max=width)
    places = torch.arange(width) - (width - sizes)[:, None]
    mask = places >= 0
    prompts = tokens.gather(1, places.clamp(min=0)).masked_fill(~mask, pad_token_id or 0)
    lists = list_column(table, beside)
    others = torch.full((len(lists), max([1, *map(len, lists)])), -1)
    for row, values in enumerate(lists):
        others[row, : len(values)] = values
    return {"prompts": prompts, "mask": mask.long(), beside: others, "real": real}
