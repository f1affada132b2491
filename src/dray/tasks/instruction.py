"""An assistant's answers in conversations of any number of turns: instructions, dialogues, calls of
tools. The loss is of the answers alone.

Conversations become texts by a chat template, the tokeniser's own or one that dray has, and are
packed into rows, in which they see nothing of each other. An export keeps the template.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field as Limits

from dray.errors import SpecError
from dray.spec import Field, Head
from dray.spec.sections import Int, Section
from dray.tasks.parts.answering import AnsweringTask
from dray.tasks.parts.templates import MARKS, TEMPLATES
from dray.tasks.parts.texts import Words
from dray.tasks.rows import IGNORED, Column
from dray.tasks.task import Batch

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor, nn

    from dray.tasks.rows import Encoded, Tools


class Instruction(AnsweringTask):
    """Answering in conversations."""

    class Settings(Section):
        """How conversations are written, and how long they may be."""

        template: Literal["own", "chatml", "alpaca"] = "own"
        """By which conversations become texts: the tokeniser's own, or one that dray has; the
        corpus' tokeniser and every export have it then."""
        drop: Literal["end", "middle"] = "end"
        """Which exchanges of a conversation that is longer than a row are left out: the last ones,
        or those after the first. One that is longer by itself is left out whole; both are
        counted."""
        answer_tokens: Annotated[Int, Limits(ge=2)] = 256
        """New tokens of an answer at most, where one is written: `dray predict` and `dray evaluate
        --thorough`."""
        beams: Annotated[Int, Limits(ge=1, le=64)] = 1
        """Answers that are followed at once there."""
        words: Words = "13a"
        """What BLEU and ROUGE count: sacrebleu's tokenisers. `zh` is for Chinese."""

    name = "instruction"
    fields: Mapping[str, Field] = {"record": Field("record")}
    columns = (Column("begins", "uint8", "token", pad=1), Column("taught", "uint8", "token"))
    packs = apart = converses = True
    head = Head("AutoModelForCausalLM", over="vocabulary", each="token", looks_ahead=False)

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.chat_template = TEMPLATES.get(self.settings.template)
        self.marks = MARKS.get(self.settings.template, ())

    @property
    def row_settings(self) -> dict[str, Any]:
        kept = self.settings.model_dump(include={"template", "drop"})
        return {"packs_rows": self.packs, "task": self.name, "version": self.version, **kept}

    def tokenizer_texts(self, texts: pa.Array, answers: pa.Array | None) -> pa.Array:
        import json

        import pyarrow as pa

        from dray.tasks.parts.chat import said

        return pa.array([said(json.loads(text)) for text in texts.to_pylist()], pa.large_string())

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        from dray.tasks.parts.chat import encode_conversations

        room = tools.row_tokens
        if self.writes:  # an answer needs some of a row
            room -= min(self.settings.answer_tokens, room // 2)
        return encode_conversations(
            texts, tools, drop=self.settings.drop, answers=not self.writes, room=room
        )

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`input_ids`, `labels` and `position_ids`, int64 [rows, sequence_tokens]; labels[:, t] is
        the token at t + 1, where that is of an answer."""
        import torch

        from dray.tasks.parts.columns import integer_column, matrix, real_rows, token_matrix

        input_ids, begins = token_matrix(table), matrix(table, "begins") == 1
        width = input_ids.shape[1]
        after = torch.arange(1, width + 1)[None, :]
        num_tokens = integer_column(table, "num_tokens") * real_rows(table)
        taught = torch.zeros_like(begins)
        # What begins a conversation follows upon nothing.
        taught[:, :-1] = ((matrix(table, "taught") == 1) & ~begins)[:, 1:]
        taught &= after < num_tokens[:, None]
        labels = torch.full_like(input_ids, IGNORED)
        labels[:, :-1] = input_ids[:, 1:]
        places = (after - 1).expand(len(input_ids), -1)
        first = torch.where(begins, places, 0).cummax(dim=1).values
        batch = {
            "input_ids": input_ids,
            "labels": labels.masked_fill(~taught, IGNORED),
            "position_ids": places - first,
        }
        if not self.writes:
            return batch
        rows = [ids[:size] for ids, size in zip(input_ids, num_tokens.tolist(), strict=True)]
        return self._asked(batch, rows, labels.new_full((len(rows), 1), IGNORED))

    def _asked(self, batch: Batch, prompts: list[Tensor], answers: Tensor) -> Batch:
        from dray.tasks.parts.writing import pad_before

        prompt, mask = pad_before(prompts, self.pad_token_id or 0)
        return {**batch, "prompt": prompt, "prompt_mask": mask, "answers": answers}

    def passes(self, table: pa.Table, draw: int, num_rows: int) -> Iterator[Batch]:
        """To the letter: each conversation by itself, and its last answer written anew."""
        if not self.writes:
            yield from super().passes(table, draw, num_rows)
            return
        import torch

        from dray.tasks.parts.writing import pad_behind

        measured = copy.copy(self)
        measured.writes = False
        packed = measured.collate(table)
        found = [
            (row, slice(start, stop))
            for row, places in enumerate(packed["position_ids"])
            for start, stop in _runs(places)
            if (packed["labels"][row, start:stop] != IGNORED).any()
        ]
        for at in range(0, len(found), num_rows):
            some = found[at : at + num_rows]
            ids, labels = (
                [packed[name][row, place] for row, place in some]
                for name in ("input_ids", "labels")
            )
            batch = {"input_ids": pad_behind(ids, self.pad_token_id or 0)}
            batch["labels"] = pad_behind(labels, IGNORED)
            batch["position_ids"] = torch.arange(batch["labels"].shape[1]).expand(len(some), -1)
            asked = [_last_answer(own) for own in labels]
            prompts = [own[: start + 1] for own, (start, _) in zip(ids, asked, strict=True)]
            wanted = [own[start:stop] for own, (start, stop) in zip(labels, asked, strict=True)]
            yield self._asked(batch, prompts, pad_behind(wanted, IGNORED))

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.objectives import NextTokenLoss

        return self.written_by(NextTokenLoss(model, label_smoothing))

    def prompt(self, text: str, tools: Tools) -> list[int]:
        from dray.tasks.parts.chat import NoConversation, encode_prompt

        try:
            return encode_prompt(text, tools)
        except NoConversation as error:
            raise SpecError(
                "prompt",
                f"cannot be asked: {error}",
                "a text is what a user says, a JSON object or list a conversation",
            ) from error


def _runs(places: Tensor) -> list[tuple[int, int]]:
    """Where each conversation of a row begins and ends: padding is one a token."""
    begins = (places == 0).nonzero()[:, 0].tolist()
    return list(zip(begins, [*begins[1:], len(places)], strict=True))


def _last_answer(labels: Tensor) -> tuple[int, int]:
    """Where a conversation's last labels without one that is ignored between them lie."""
    taught = (labels != IGNORED).nonzero()[:, 0].tolist()
    start = taught[-1]
    known = set(taught)
    while start - 1 in known:
        start -= 1
    return start, taught[-1] + 1
