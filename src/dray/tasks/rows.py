"""What a row of a corpus holds besides its tokens, and what a task makes of documents.

A row is `input_ids` [sequence_tokens], `num_tokens`, and the columns that its task names: a number
for each of its tokens, or one, an array of some shape, or as many as a document has for the row.
Packing cuts and pads what belongs to tokens as it does the tokens. A task whose documents are no
texts has no `input_ids`, and `num_tokens` is what it says of each: rows of like sizes are read
together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa


IGNORED = -100
"""The label of a position without a target."""


SEGMENT = "segment"
"""The column that says which text of its row a token is of, 0 or 1, if the task has it: models get
it as `token_type_ids`."""


@dataclass(frozen=True)
class Column:
    """A column of rows, of numbers."""

    name: str
    dtype: str = "int32"
    each: Literal["row", "token"] = "row"
    """What has a value of its own."""
    names: bool = False
    """Whether values number names of classes: then they are numbers of `Tools.number` until all
    documents are read, and those of the sorted classes in the rows; negative ones stay."""
    shape: tuple[int, ...] = ()
    """Of each row's value, where it is an array. In tables it lies flat, a list of one length."""
    varies: bool = False
    """Whether each row has as many numbers as it likes: the bytes of a file, say, or samples."""
    hot: bool = False
    """Whether a document has a list of classes, which becomes a 1 or 0 for each of them."""
    pad: int = 0
    """What stands where there is no token of the document's text."""
    extends: bool = False
    """Whether what ends a document has the value of its last token."""
    told: bool = False
    """Whether the model that the run begins with tells it (`Task.tell`) once the rows are there:
    `encode` gives none."""


FIRST_WORD = 2
"""The first id of a word in a vocabulary of whole words; before it are padding and what stands for
all other words."""
UNKNOWN_WORD = 1

SEPARATOR = "\x1f"
"""Between the parts of a text or a target that has several."""

VOTES = "votes"
"""The column of what rules say of a row's text, [rules], if the task has `rules`: 0 where one keeps
out, else one more than the place of its label among those that rules vote for."""

HIDDEN = "hidden"
"""The column of the places of those tokens of a row that a model is not to see, where augmentation
hides some."""


class Tools(Protocol):
    """What a task encodes documents with."""

    prefix: tuple[int, ...]
    """Ids before each document."""
    middle: tuple[int, ...]
    """Ids between two texts of one."""
    suffix: tuple[int, ...]
    """Ids after each document."""
    row_tokens: int
    """Tokens that a row has room for."""
    dtype: str
    """Of ids."""

    def encode(self, texts: pa.Array) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Ids of texts end to end, without any around them, and the number of each text's."""

    def encode_words(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Ids of each text, and where in it each begins (characters)."""

    @property
    def chat_template(self) -> str | None:
        """By which the tokeniser makes texts of conversations, in Jinja."""

    @property
    def roles(self) -> Mapping[str, str]:
        """The text of each token that has a role, such as `eos_token`."""

    @property
    def special(self) -> frozenset[str]:
        """The texts of all tokens that no text is made of."""

    @property
    def word_starts(self) -> npt.NDArray[np.uint8]:
        """By id: 1 where a token begins a word, 0 where it goes on with one, 2 where it is
        special."""

    def number(self, names: pa.Array) -> npt.NDArray[np.int32]:
        """Numbers of names; -1 for null."""

    def file(self, name: str) -> bytes:
        """One of `Task.files`, as it was when the corpus was prepared."""


@dataclass(frozen=True)
class Encoded:
    """Documents as a task encodes them. A record may become several, or none."""

    tokens: npt.NDArray[np.unsignedinteger]
    """End to end."""
    lengths: npt.NDArray[np.int64]
    columns: Mapping[str, Any] = field(default_factory=dict)
    """By name: for tokens end to end, for documents one each: an array [documents, *shape], of
    hot and varying columns lists of numbers (pyarrow; `encoding.join_lists` makes some)."""
    records: npt.NDArray[np.int64] | None = None
    """The record of each document, where it is not the one at its place."""
    num_lost: npt.NDArray[np.int64] | None = None
    """Tokens of each document that its row had no room for."""
    untold: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Places in some records of what nothing can be told of: words that are no token. A task that
    has them gets them back as `untold` of `join_predictions`."""
    refused: Mapping[int, str] = field(default_factory=dict)
    """Records that are no documents, such as images that cannot be decoded, and why in two or
    three words: they are left out, and counted by reason."""
