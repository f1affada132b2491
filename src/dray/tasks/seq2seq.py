"""An answer to each text: translation, a summary, a reply. The loss is of the answer alone.

The text is read by an encoder, and the answer written by a decoder behind it; or, `decoder_only`,
both stand in one row, with what the tokeniser puts between two texts between them. Rows are pairs,
padded to the longest of their batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field as Limits

from dray.spec import Field, Head
from dray.spec.sections import Int, Section
from dray.tasks.parts.answering import AnsweringTask
from dray.tasks.parts.texts import Words
from dray.tasks.rows import IGNORED, Column
from dray.tasks.task import Batch

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor, nn

    from dray.tasks.rows import Encoded, Tools


class Seq2Seq(AnsweringTask):
    """Writing an answer to a text."""

    class Settings(Section):
        """How answers are written."""

        decoder_only: bool = False
        """Whether a language model reads the text and writes the answer in one row; else an encoder
        reads and a decoder writes."""
        answer_tokens: Annotated[Int, Limits(ge=2)] = 128
        """Tokens of an answer at most, and no more than a row's (with `decoder_only`, what half of
        a row leaves of a long text's); a longer one is cut, and counted."""
        beams: Annotated[Int, Limits(ge=1, le=64)] = 4
        """Answers that are followed at once where the likeliest is looked for: `dray predict` and
        `dray evaluate --thorough`."""
        words: Words = "13a"
        """What BLEU and ROUGE count: sacrebleu's tokenisers. `zh` is for Chinese."""

    name = "seq2seq"
    fields: Mapping[str, Field] = {
        "text": Field("text"),
        "answer": Field("answer", column="answer"),
    }

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        alone = self.settings.decoder_only
        self.columns = (
            (Column("prompt"), Column("whole", "uint8"))
            if alone
            else (Column("answer", varies=True),)
        )
        self.head = Head(
            "AutoModelForCausalLM" if alone else "AutoModelForSeq2SeqLM",
            over="vocabulary",
            each="token",
            looks_ahead=not alone,
            behind_encoder=not alone,
        )

    @property
    def row_settings(self) -> dict[str, Any]:
        kept = self.settings.model_dump(include={"decoder_only", "answer_tokens"})
        return {"packs_rows": self.packs, "task": self.name, "version": self.version, **kept}

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        from dray.tasks.parts.encoding import (
            encode_answered,
            encode_answered_in_a_row,
            encode_without,
        )

        most = self.settings.answer_tokens
        encode = encode_answered_in_a_row if self.settings.decoder_only else encode_answered
        if targets is None:
            return encode(texts, None, tools, most)
        empty = {
            place: "empty answer"
            for place, answer in enumerate(targets.to_pylist())
            if not answer.strip()
        }
        return encode_without(
            empty, texts, targets, lambda some, answers: encode(some, answers, tools, most)
        )

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`input_ids`, `attention_mask` and `labels`, int64 [rows, width]. Of a decoder alone
        labels[:, t] is the token at t + 1, where it is the answer's; else the answer, in a width of
        its own."""
        batch = self._alone(table) if self.settings.decoder_only else self._behind(table)
        if not self.writes:
            return {name: values for name, values in batch.items() if name not in _FOR_WRITING}
        return batch

    def _behind(self, table: pa.Table) -> Batch:
        from dray.tasks.parts.columns import list_column, padded_tokens, real_rows
        from dray.tasks.parts.writing import pad_behind

        batch = padded_tokens(table, self.pad_token_id)
        labels = pad_behind(list_column(table, "answer"), IGNORED)
        batch["labels"] = labels.masked_fill(~real_rows(table)[:, None], IGNORED)
        batch["prompt"], batch["prompt_mask"] = batch["input_ids"], batch["attention_mask"]
        return {**batch, "answers": batch["labels"]}

    def _alone(self, table: pa.Table) -> Batch:
        import torch

        from dray.tasks.parts.columns import integer_column, padded_tokens, real_rows
        from dray.tasks.parts.writing import pad_before

        batch = padded_tokens(table, self.pad_token_id)
        ids, prompts = batch["input_ids"], integer_column(table, "prompt")
        ends = integer_column(table, "num_tokens") * real_rows(table)
        ends -= 1 - integer_column(table, "whole")  # a cut answer has not come to its end
        after = torch.arange(1, ids.shape[1] + 1)[None, :]  # the place that is predicted
        asked = (after >= prompts[:, None]) & (after < ends[:, None])
        labels = torch.full_like(ids, IGNORED)
        labels[:, :-1] = ids[:, 1:]
        batch["labels"] = batch["answers"] = labels.masked_fill(~asked, IGNORED)
        if self.writes:
            rows: list[Tensor] = [
                row[:size] for row, size in zip(ids, prompts.tolist(), strict=True)
            ]
            batch["prompt"], batch["prompt_mask"] = pad_before(rows, self.pad_token_id or 0)
        return batch

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.objectives import NextTokenLoss
        from dray.tasks.parts.writing import DecodedLoss

        loss: nn.Module = (NextTokenLoss if self.settings.decoder_only else DecodedLoss)(
            model, label_smoothing
        )
        return self.written_by(loss)

    def prompt(self, text: str, tools: Tools) -> list[int]:
        ids = super().prompt(text, tools)
        return [*ids, *(tools.middle if self.settings.decoder_only else tools.suffix)]


_FOR_WRITING = ("prompt", "prompt_mask", "answers")
