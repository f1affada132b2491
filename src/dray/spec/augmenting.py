"""What a spec says of augmentation: which rows are read otherwise than they were prepared, and
how."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dray.spec.sections import Float, Int, OriginName, Section

TEXT_CHANGES = (
    "synonyms",
    "insertion",
    "swap",
    "deletion",
    "keyboard",
    "ocr",
    "back_translation",
)
"""Kinds that change a document's text, which is encoded anew."""
TOKEN_CHANGES = ("token_cutoff", "span_masking")
"""Kinds that hide tokens of a row."""
KEEPS_PLACES = ("synonyms", "keyboard", "ocr", *TOKEN_CHANGES)
"""Kinds that leave as many words as there were, each in its place."""
BY_THESAURUS = ("synonyms", "insertion")


class Translator(Section):
    """A model that answers texts by texts: a run of the task seq2seq, or a folder that `dray
    export` wrote of one, or any of transformers' encoder-decoders with its tokeniser."""

    run: OriginName | None = None
    """A run in the same storage, at its newest checkpoint."""
    path: str | None = None
    """A Hugging Face folder."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.run is None) == (self.path is None):
            raise ValueError("exactly one of `run` and `path` is needed")
        return self


class BackTranslation(Section):
    """Documents in the words that come back from another language, written once when the corpus is
    prepared."""

    there: Translator
    """Into the other language."""
    back: Translator
    """And back."""
    max_tokens: Annotated[Int, Field(ge=2, le=4096)] = 128
    """Tokens of a translation at most. A document that a translator has no room for keeps its
    text."""


class Augmentation(Section):
    """Training rows that are read in other words each time. What is done to a row is drawn from the
    seed, the epoch and the row alone; validation rows stay as they are."""

    kinds: Annotated[
        tuple[
            Literal[
                "synonyms", "insertion", "swap", "deletion", "keyboard", "ocr", "back_translation",
                "token_cutoff", "span_masking",
            ],
            ...,
        ],
        Field(min_length=1),
    ]  # fmt: skip
    """One of them is drawn for each row that is changed: words replaced by `synonyms`, `insertion`
    of such, two words that `swap` their places, `deletion`, slips of the `keyboard`, misreadings of
    print (`ocr`), `back_translation`; `token_cutoff` and `span_masking` put the mask token in the
    place of single tokens, or of one span."""
    share: Annotated[Float, Field(gt=0, le=1)] = 0.5
    """Share of the rows that are changed, others each time."""
    strength: Annotated[Float, Field(gt=0, le=1)] = 0.1
    """Share of a text's words, or of a row's tokens, that a kind changes; at least one."""
    thesaurus: str | None = None
    """The file of `synonyms` and `insertion`: as MyThes has it (Debian's mythes-en-us:
    /usr/share/mythes/th_en_US_v2.dat), or lines of words that mean the same, with spaces
    between."""
    back_translation: BackTranslation | None = None
    """By which models `back_translation` goes."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if twice := next((kind for kind in self.kinds if self.kinds.count(kind) > 1), ""):
            raise ValueError(f"kinds names {twice} twice; each is drawn as often as the others")
        asked = [kind for kind in self.kinds if kind in BY_THESAURUS]
        if bool(asked) != bool(self.thesaurus):
            raise ValueError(
                f"kinds has {', '.join(asked)}: `thesaurus` is needed, a file of synonyms"
                if asked
                else "thesaurus is of the kinds synonyms and insertion, and neither is given"
            )
        if ("back_translation" in self.kinds) != (self.back_translation is not None):
            raise ValueError(
                "the kind back_translation and the section back_translation belong together; give "
                "both, or neither"
            )
        return self

    @property
    def changes_texts(self) -> bool:
        """Whether rows need their texts."""
        return any(kind in TEXT_CHANGES for kind in self.kinds)

    @property
    def hides_tokens(self) -> bool:
        """Whether rows need a mask token."""
        return any(kind in TOKEN_CHANGES for kind in self.kinds)
