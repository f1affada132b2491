"""Texts of recorded speech, letter by letter, by connectionist temporal classification: no
alignment of text and sound is needed.

A row is a recording, as log-mel energies (Wav2Vec2-BERT's) or as samples (Wav2Vec2's and its
kin's). A token is 20 ms of it, so `data.sequence_tokens: 500` takes up to 10 seconds. Training may
see spans of time and bands hidden, by numbers that belong to the step and the recording.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field as Limits
from pydantic import model_validator

from dray.spec import Direction, Field, Head
from dray.spec.sections import Float, Int, Section
from dray.tasks.rows import Column
from dray.tasks.task import Batch, Output, Task, TaskMetrics

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn

    from dray.tasks.parts.graphs import Graph
    from dray.tasks.rows import Encoded, Tools


class SpeechRecognition(Task):
    """What is said in a recording."""

    class Settings(Section):
        """What models hear, and which letters they write."""

        features: Literal["log_mel", "samples"] = "log_mel"
        """`log_mel`: energies of 80 bands, for architectures that take `input_features`
        (wav2vec2-bert); `samples`: the sound itself, for those that take `input_values` (wav2vec2,
        hubert, wavlm; give them model.options.feat_extract_norm=layer, since the other way means
        are taken over padding, too)."""
        characters: Annotated[str, Limits(min_length=2, max_length=20_000)] = (
            " 'abcdefghijklmnopqrstuvwxyz"
        )
        """The letters of texts. A record with another one is left out, and counted."""
        case: Literal["lower", "upper", "keep"] = "lower"
        """What becomes of letters before."""
        time_masks: Annotated[Int, Limits(ge=0, le=50)] = 0
        """Spans of each recording that training hides."""
        time_share: Annotated[Float, Limits(gt=0, le=1)] = 0.05
        """The longest of them, as a share of the recording."""
        band_masks: Annotated[Int, Limits(ge=0, le=10)] = 0
        """Runs of bands of each recording that training hides; log_mel alone."""
        band_width: Annotated[Int, Limits(ge=1, le=80)] = 20
        """Bands in the widest of them."""
        beam: Annotated[Int, Limits(ge=2, le=256)] = 16
        """Beginnings of a text that `dray evaluate --thorough` keeps; else the likeliest letter of
        each 20 ms is taken."""

        @model_validator(mode="after")
        def _whole(self) -> Self:
            if len(set(self.characters)) < len(self.characters):
                raise ValueError("characters: one is there twice")
            if self.band_masks and self.features == "samples":
                raise ValueError("band_masks: samples have no bands; give time_masks alone")
            return self

    name = "speech_recognition"
    smooths = False
    tokenizes = False
    predicts = True
    fields: Mapping[str, Field] = {"audio": Field("bytes"), "text": Field("answer")}
    metrics: Mapping[str, Direction] = {
        "loss": "lower",
        "wer": "lower",
        "cer": "lower",
        "exact": "higher",
    }
    head = Head("AutoModelForCTC", over="labels", each="token")
    searches = False
    """Whether texts are looked for by a beam."""

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.num_outputs = len(self.settings.characters) + 1
        self._hears_samples = self.settings.features == "samples"
        sound = Column("sound", "int16" if self._hears_samples else "float16", varies=True)
        self.columns = (sound, Column("letters", "uint16", varies=True))

    @property
    def row_settings(self) -> dict[str, Any]:
        names = ("features", "characters", "case")
        own = {name: getattr(self.settings, name) for name in names}
        return {"task": self.name, "version": self.version, **own}

    @property
    def model_options(self) -> Mapping[str, Any]:
        """What models would drop or hide themselves, by numbers of no row, is switched off."""
        return {
            "vocab_size": self.num_outputs,
            "pad_token_id": 0,
            "ctc_zero_infinity": True,
            "apply_spec_augment": False,
            "layerdrop": 0.0,
            "feature_projection_input_dim": 160,
        }

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        """Files as features and texts as letters; what is no sound, is longer than a row, or is
        shorter than its text takes, is refused."""
        import numpy as np

        from dray.tasks.parts.encoding import join_lists, read_bytes, with_columns
        from dray.tasks.rows import Encoded

        wanted = [None] * len(texts) if targets is None else targets.to_pylist()
        refused: dict[int, str] = {}
        sounds, letters, records, lengths = [], [], [], []
        for place, (content, text) in enumerate(zip(read_bytes(texts), wanted, strict=True)):
            row = self._read(content, text, tools.row_tokens)
            if isinstance(row, str):
                refused[place] = row
                continue
            sound, own, length = row
            sounds.append(sound)
            letters.append(np.array(own, np.uint16))
            records.append(place)
            lengths.append(length)
        kind = self.columns[0].dtype
        encoded = Encoded(
            np.empty(0, tools.dtype),
            np.array(lengths, np.int64),
            {"sound": join_lists(sounds or [np.empty(0, kind)])[: len(sounds)]},
            records=np.array(records, np.int64),
            refused=refused,
        )
        if targets is None:
            return encoded
        own_letters = join_lists(letters or [np.empty(0, np.uint16)])[: len(letters)]
        return with_columns(encoded, letters=own_letters)

    def _read(
        self, content: bytes, text: str | None, most: int
    ) -> tuple[Any, list[int], int] | str:
        """A recording's features, letters and tokens; or why it is no row."""
        import numpy as np

        from dray.tasks.parts.sounds import RATE, TOKEN_SAMPLES, log_mel, read_sound

        letters = [] if text is None else self._letters(text)
        if isinstance(letters, str):
            return letters
        samples = read_sound(content)
        if isinstance(samples, str):
            return samples
        length = len(samples) // TOKEN_SAMPLES
        if length > most:
            return f"longer than data.sequence_tokens ({most * TOKEN_SAMPLES / RATE:g} s)"
        sound = samples if self._hears_samples else log_mel(samples)
        # Each letter takes a token, and a blank between two equal ones takes another.
        states = (length - 1) if self._hears_samples else len(sound)
        repeated = sum(one == other for one, other in pairwise(letters))
        if states < max(1, len(letters) + repeated):
            return "shorter than its text takes"
        if self._hears_samples:
            return np.round(sound * 32767).astype(np.int16), letters, length
        return sound.astype(np.float16).reshape(-1), letters, len(sound)

    def _letters(self, text: str) -> list[int] | str:
        """The numbers of a text's letters, from 1; or why it has none."""
        own = " ".join(text.split())
        own = own if self.settings.case == "keep" else getattr(own, self.settings.case)()
        numbers = {letter: place for place, letter in enumerate(self.settings.characters, 1)}
        if not own:
            return "nothing is said"
        if other := next((letter for letter in own if letter not in numbers), None):
            return f"{other!r} is none of task.characters"
        return [numbers[letter] for letter in own]

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """`input_features` [rows, tokens, 160] or `input_values` [rows, samples], fp32;
        `attention_mask` beside them; `letters` [rows, most] and `num_letters` [rows], int64: none
        of padding rows."""
        import torch

        from dray.tasks.parts.columns import list_column, real_rows
        from dray.tasks.parts.sounds import STACKED, normalized, padded

        sounds = list_column(table, "sound")
        rows = [
            normalized(sound) if self._hears_samples else sound.float().view(-1, STACKED)
            for sound in sounds
        ]
        values, inside = padded(rows)
        real = real_rows(table).tolist()
        texts = [
            own.long() if is_real else own.new_zeros(0).long()
            for own, is_real in zip(list_column(table, "letters"), real, strict=True)
        ]
        letters = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        return {
            self._input: values,
            "attention_mask": inside,
            "letters": letters if letters.shape[1] else letters.new_zeros(len(texts), 1),
            "num_letters": torch.tensor([len(own) for own in texts]),
        }

    @property
    def _input(self) -> str:
        return "input_values" if self._hears_samples else "input_features"

    def vary(self, batch: Batch, table: pa.Table, draw: int) -> Batch:
        """The recordings with spans and bands hidden."""
        from dray.tasks.parts.columns import drawn_by_row
        from dray.tasks.parts.sounds import hide_bands, hide_spans

        own = self.settings
        if not own.time_masks and not own.band_masks:
            return batch
        num_drawn = 2 * (own.time_masks + own.band_masks)
        drawn = drawn_by_row(table, draw, num_drawn)
        values, lengths = batch[self._input], batch["attention_mask"].sum(dim=1)
        if own.time_masks:
            values = hide_spans(values, lengths, drawn, num=own.time_masks, share=own.time_share)
        if own.band_masks:
            rest = drawn[:, 2 * own.time_masks :]
            values = hide_bands(values, rest, num=own.band_masks, most=own.band_width)
        return {**batch, self._input: values}

    def num_targets(self, batch: Batch) -> int:
        return int(batch["num_letters"].sum())

    def model_inputs(self, num_rows: int, num_tokens: int) -> Batch:
        import torch

        from dray.tasks.parts.sounds import STACKED, TOKEN_SAMPLES

        if self._hears_samples:
            return {self._input: torch.zeros(num_rows, num_tokens * TOKEN_SAMPLES)}
        return {self._input: torch.zeros(num_rows, num_tokens, STACKED)}

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        from dray.tasks.parts.alignments import AlignmentLoss

        return AlignmentLoss(model, [self._input])

    def graph(self, model: Any) -> Graph:
        from dray.tasks.parts.graphs import logits_graph

        return logits_graph(self, model, masked=True)

    def thorough(self) -> SpeechRecognition:
        exact = copy.copy(self)
        exact.searches = True
        return exact

    def new_metrics(self) -> TaskMetrics:
        from dray.tasks.parts.alignments import TextMetrics

        return TextMetrics(self._wanted, self._found)

    def _wanted(self, batch: Batch) -> list[str]:
        pairs = zip(batch["letters"].tolist(), batch["num_letters"].tolist(), strict=True)
        return [self._text(letters[:length]) for letters, length in pairs]

    def _found(self, output: Output) -> list[str]:
        """The texts that the model hears; they begin and end with no space."""
        from dray.tasks.parts.alignments import read_by_beam, read_greedily

        scores, num_states = output["log_scores"], output["num_states"]
        found = (
            read_by_beam(scores, num_states, self.settings.beam)
            if self.searches
            else read_greedily(scores, num_states)
        )
        return [self._text(letters).strip() for letters in found]

    def _text(self, letters: list[int]) -> str:
        return "".join(self.settings.characters[letter - 1] for letter in letters)

    def predictions(self, batch: Batch, output: Output) -> list[Any]:
        """The text of each recording."""
        return [{"prediction": text} for text in self._found(output)]

    def save_processor(self, folder: str) -> None:
        """A processor of transformers: the extractor of features, and the letters as a tokeniser
        (`|` stands for the space, as in all of its kind, unless it is a letter)."""
        import json
        from pathlib import Path

        from transformers import (
            SeamlessM4TFeatureExtractor,
            Wav2Vec2CTCTokenizer,
            Wav2Vec2FeatureExtractor,
        )

        space = " " if "|" in self.settings.characters else "|"
        letters = ["<pad>", *self.settings.characters.replace(" ", space)]
        vocabulary = {letter: number for number, letter in enumerate(letters)}
        path = Path(folder, "vocab.json")
        path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        blank = "<pad>"
        Wav2Vec2CTCTokenizer(
            str(path),
            unk_token=blank,
            pad_token=blank,
            bos_token=None,
            eos_token=None,
            word_delimiter_token=space,
        ).save_pretrained(folder)
        kind = Wav2Vec2FeatureExtractor if self._hears_samples else SeamlessM4TFeatureExtractor
        kind(return_attention_mask=True).save_pretrained(folder)
