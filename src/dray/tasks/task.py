"""What a task is: the one thing the training loop knows about what is being learnt. `rows.py` has
what its rows are made of (`Column`, `Encoded`), `spec/tasks.py` what a spec asks of it (`Field`,
`Head`) and how tasks are found.

A task turns rows into a batch, puts a summed loss around a model, and turns outputs into metrics
that add up over ranks. It owns no optimiser or process group, and never divides by a count: the
loop divides by the targets of the global batch.
"""

from __future__ import annotations

import copy
import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

from dray.spec import TEXT_KINDS, Direction, Field, Head, NoSettings
from dray.spec.sections import Section
from dray.tasks.rows import IGNORED, Column

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor, nn

    from dray.tasks.parts.graphs import Graph
    from dray.tasks.parts.scores import Scores
    from dray.tasks.rows import Encoded, Tools

Batch = dict[str, "Tensor"]
Output = dict[str, "Tensor"]
Decode = Callable[[Sequence[int]], str]
"""Ids as text, without special tokens."""
Terms = dict[str, tuple["Tensor", "Tensor"]]
"""Named parts of a loss: the sum over a batch's targets, and their number."""


def draw_of(seed: int, step: int) -> int:
    """What tasks draw by at a step; a validation is drawn by as step 0, always the same."""
    digest = hashlib.blake2b(struct.pack("<2Q", seed, step), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class Corpus(Protocol):
    """What a task needs to know of a corpus; its manifest has it."""

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def labels(self) -> Sequence[str]: ...

    @property
    def mask_token_id(self) -> int | None: ...

    @property
    def vocab_size(self) -> int: ...


class Held(Protocol):
    """What metrics may need to know of the rows that were measured; a split of a manifest has
    it."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_text_bytes(self) -> int: ...


class TaskMetrics(Protocol):
    """Sums over the batches of one validation, which add up over ranks in any order."""

    def update(self, batch: Batch, output: Output) -> None:
        """Add one batch."""

    def state(self) -> dict[str, Any]:
        """The sums as plain values that can be sent anywhere."""

    def merge(self, states: Iterable[dict[str, Any]]) -> TaskMetrics:
        """Add the sums of others, and return self."""

    def compute(self) -> dict[str, float]:
        """The metrics by name. `loss` is always among them."""

    def undefined(self) -> tuple[str, ...]:
        """Names of those whose value stands for nothing on the rows seen."""


class Task:
    """One file a task: what a spec must know of it as attributes of the class, what is done with
    rows and models as methods. It imports torch where it is used, since a spec and a plan load it.

    `settings` are its own keys in the spec. `on(…)` gives it the corpus that it is learnt from.
    """

    name: str
    Settings: type[Section] = NoSettings
    fields: Mapping[str, Field]
    metrics: Mapping[str, Direction]
    columns: tuple[Column, ...] = ()
    """What rows hold besides their tokens."""
    num_outputs: int | None = None
    """How many numbers its head gives, where no classes decide it."""
    is_default = False
    """Whether a spec that names no task means this one."""
    packs = False
    apart = False
    """Whether documents packed into a row see nothing of each other: then batches have the
    `position_ids` by which they are known, 0 at the first token of each."""
    version = 0
    """Raised when `encode` makes other rows of the same documents: what was prepared before is not
    taken for them then."""
    tokenizes = True
    """Whether its documents are texts that become tokens; else its rows are its columns alone."""
    whole_words = False
    """Whether its tokens are whole words or names, never pieces of text: `tokenizer.train` is
    `words` then."""
    fixed_tokens: int | None = None
    """Tokens of every row, where rows have as many whatever `data.sequence_tokens` says: 1 where a
    row is one thing of one size."""
    needed_tokens = 0
    """Tokens that a row must have room for beside a document's first one: an answer that is written
    there, say."""
    smooths = True
    """Whether its loss has classes that `regularization.label_smoothing` smooths."""
    rows_together = 1
    """Rows of a step that must be computed at once: each so many, from the first. What `collate`
    makes of a row may depend on the others of these, which stay the same on any number of
    workers."""
    generates = False
    continues = True
    """Whether what its models write goes on with a prompt, of which the last tokens may do; else it
    answers a prompt, which is whole or refused."""
    predicts = False
    """Whether its models tell something of each document."""
    serves: Sequence[str] = ()
    """By which routes of a service its predictions are asked for besides `/predict`: `classify`
    where a prediction is a class, `extract` where it is something of each word, `embeddings` where
    it is a vector."""
    converses = False
    """Whether its documents are conversations, of which the tokeniser's chat template makes
    texts."""
    marks: Sequence[str] = ()
    """Special tokens that a tokeniser gets which is trained for it."""
    chat_template: str | None = None
    """What its corpora's tokenisers get as theirs; None: they keep their own."""
    masks = False
    """Whether it needs a token that stands for one that is to be guessed."""
    explores = False
    """Whether something of a step's rows must be found out by the model itself before it learns
    from them (`explored`)."""
    adds = False
    """Whether what it trains is a part that it adds to a model (`add_part`): the model stays as it
    is, is made again from where it came, and stands in no checkpoint."""
    pools = False
    """Whether its loss is of all rows of a global batch together, by `pooled_losses`."""
    rules: Sequence[str] = ()
    """Names of rules, whose votes rows have as the column VOTES."""
    tells_tokens = False
    """Whether what it predicts are tokens by name: then it has `token_names` when it predicts."""
    fits = False
    """Whether something is taken from a sample of its training documents once (`fit`), by which all
    documents are encoded then."""
    finds_features = False
    """Whether what its models tell are features of tokens (`activations`), when they predict."""
    head: Head

    def __init__(self, settings: Any = None) -> None:
        self.settings: Any = self.Settings() if settings is None else settings
        self.labels: tuple[str, ...] = ()
        """Names of the classes in the order of their ids."""
        self.label_counts: Mapping[str, float] = {}
        """Training documents of each class."""
        self.num_labels = 2
        self.pad_token_id: int | None = None
        self.mask_token_id: int | None = None
        self.vocab_size = 0
        self.decode: Decode | None = None
        self.fitted: Sequence[Mapping[str, Any]] = ()
        """What `fit` has given for the corpus."""
        self.token_names: Sequence[str] = ()
        """By id, where a model predicts and `tells_tokens`."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return self.name

    @property
    def row_settings(self) -> dict[str, Any]:
        """What of the task decides over its rows: a part of a corpus' key. It is a class' own: one
        that says nothing shares no corpus with another class, nor with itself under other settings,
        fields, columns or another version."""
        return {
            "packs_rows": self.packs,
            "task": self.name,
            "version": self.version,
            "settings": self.settings.model_dump(mode="json"),
            "fields": {
                name: [field.kind, field.column, field.place, field.most]
                for name, field in self.fields.items()
            },
            "columns": [vars(column) for column in self.columns],
        }

    @property
    def asked(self) -> Mapping[str, Field]:
        """What a prediction reads of a record: its fields but the target, and those that are there
        for learning alone."""
        return {
            name: field
            for name, field in self.fields.items()
            if field.kind in TEXT_KINDS and field.asked
        }

    @property
    def files(self) -> Mapping[str, str]:
        """The places of files that `encode` goes by, by the names under which a corpus keeps them:
        what they hold is a part of its key."""
        return {}

    def reading(self, files: Mapping[str, str]) -> Self:
        """The task with its files in other places, by name."""
        return self

    def read_files(self) -> Mapping[str, bytes]:
        """What the files hold. Raises UserError where one is not there, or no such file, and for
        settings of which only `encode` would find out that no row can be made by them."""
        return {}

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """The place of each class by id, where they are in an order."""
        return None

    @property
    def model_options(self) -> Mapping[str, Any]:
        """Fields of the model's configuration that follow from the task, where it has them: the
        size of its images, say."""
        return {}

    @property
    def has_classes(self) -> bool:
        """Whether its rows have numbers of classes, which the corpus finds in the documents."""
        return any(column.names or column.hot for column in self.columns)

    def on(
        self, corpus: Corpus, num_labels: int | None = None, decode: Decode | None = None
    ) -> Self:
        """The task on a corpus, with as many classes as a spec wants or else the corpus has.
        `decode`: the corpus' tokeniser, where a model is there to write texts."""
        bound = copy.copy(self)
        bound.labels, bound.pad_token_id = tuple(corpus.labels), corpus.pad_token_id
        bound.mask_token_id, bound.vocab_size = corpus.mask_token_id, corpus.vocab_size
        bound.decode = decode
        bound.label_counts = getattr(corpus, "label_counts", {})  # few need them
        bound.fitted = getattr(corpus, "fitted", ())
        bound.num_labels = self.num_outputs or num_labels or len(corpus.labels) or 2
        return bound

    def words(self, texts: pa.Array) -> pa.Array:
        """What of documents is a token each, between SEPARATORs, where `whole_words`: a vocabulary
        is made of it, and `encode` looks it up there."""
        return texts

    def tokenizer_texts(self, texts: pa.Array, answers: pa.Array | None) -> pa.Array:
        """What of documents a tokeniser is trained on and checked with: the texts, and the answers
        where the task has some."""
        import pyarrow as pa

        if answers is None:
            return texts
        both = [text for pair in zip(texts, answers, strict=True) for text in pair]
        return pa.array([text.as_py() for text in both], pa.large_string())

    def fit(self, texts: pa.Array) -> Sequence[Mapping[str, Any]]:
        """What documents are encoded by besides, where `fits`, from a sample of those to train on:
        plain values, which the manifest keeps. Where one of them has a text `said`, people read it.
        Raises CorpusError where the sample is none for it."""
        raise NotImplementedError

    def fitted_by(self, fitted: Sequence[Mapping[str, Any]]) -> Self:
        """The task with what `fit` has given."""
        bound = copy.copy(self)
        bound.fitted = fitted
        return bound

    def encode(self, texts: pa.Array, targets: pa.Array | None, tools: Tools) -> Encoded:
        """Cleaned documents as tokens and the task's columns: packed ones with what stands around
        them, others without."""
        from dray.tasks.parts.encoding import encode_texts

        return encode_texts(texts, tools, surrounded=self.packs)

    def collate(self, table: pa.Table, draw: int = 0) -> Batch:
        """Rows of a token shard with their `row_id` as tensors on the CPU. Rows with row_id < 0 get
        no targets.

        `draw` belongs to the step and the seed: what is drawn for a row depends on that and on its
        id alone, so that a resumed run draws the same.
        """
        raise NotImplementedError

    def vary(self, batch: Batch, table: pa.Table, draw: int) -> Batch:
        """A batch of these rows as it is learnt from, where that is not what is validated: images
        that are turned, say. It is drawn as `collate` draws."""
        return batch

    @property
    def remarks(self) -> Sequence[str]:
        """What somebody should know who uses an exported model by transformers alone."""
        return ()

    def save_processor(self, folder: str) -> None:
        """Write into an export what makes a model's inputs of documents that are no texts, as
        transformers reads it."""

    def model_inputs(self, num_rows: int, num_tokens: int) -> Batch:
        """What a model is given of so many rows of so many tokens, whatever it holds: where a task
        does not tokenise, models are measured by it instead of by formulas."""
        raise NotImplementedError

    def passes(self, table: pa.Table, draw: int, num_rows: int) -> Iterator[Batch]:
        """What is computed of rows to evaluate a model on them, at most `num_rows` at once."""
        for first in range(0, table.num_rows, num_rows):
            yield self.collate(table.slice(first, num_rows), draw)

    def thorough(self) -> Self | None:
        """The task as it evaluates models to the letter of its metric, where what a validation
        does is only quicker; None where it is the same."""
        return None

    def num_targets(self, batch: Batch) -> int:
        """Number of terms in the batch's loss."""
        return int((batch["labels"] != IGNORED).sum())

    def objective(self, model: Any, label_smoothing: float = 0.0) -> nn.Module:
        """The model with its loss inside, as `model`: what is wrapped, compiled and called.

        `forward(batch)` gives the terms of the loss, each summed over the batch's targets (fp32)
        beside their number, and what the metrics need where no gradient is wanted. Labels are
        smoothed in training alone.
        """
        raise NotImplementedError

    def graph(self, model: Any) -> Graph:
        """A trained model as a function of tensors, which an export for other runtimes computes:
        by default what a row is to the model goes in, and its logits come out."""
        from dray.tasks.parts.graphs import logits_graph

        return logits_graph(self, model)

    def add_part(self, model: Any) -> None:
        """Add to a model what is trained of it, where it `adds`: on the device and in the precision
        of its parameters, which may be the meta device, and drawn from torch's generator. Raises
        SpecError for a model that cannot have it."""
        raise NotImplementedError

    def explored(self, batch: Batch, output: Output, means: Mapping[str, Tensor]) -> Batch:
        """What is learnt from in place of a batch, of a task that explores: given what the
        objective makes of it where no gradient is wanted, and the means of all its terms over the
        step's rows on all ranks, by name."""
        raise NotImplementedError

    def tell(self, batch: Batch, output: Output) -> Mapping[str, Tensor]:
        """Columns that are `told`, by name: a number for each row of a batch [rows], from what the
        objective gives of it where no gradient is wanted. In the batch they are 0 until then."""
        raise NotImplementedError

    def pooled_losses(self, pooled: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The loss of each row of a global batch, [rows], where `pools`: a function without
        parameters of what the objective gives as `pooled` for all of them, [rows, …], in their
        order."""
        raise NotImplementedError

    def check(self, corpus: Corpus) -> None:
        """Raise SpecError where the settings do not go with a corpus, before a run begins on it."""

    def new_metrics(self) -> TaskMetrics:
        """Empty sums."""
        raise NotImplementedError

    def prompt(self, text: str, tools: Tools) -> list[int]:
        """The ids by which a model that generates is asked to write. Raises SpecError for a text
        that is no prompt."""
        import pyarrow as pa

        ids, _ = tools.encode(pa.array([text], pa.large_string()))
        return [*tools.prefix, *ids.tolist()]

    def predicting(self) -> Self:
        """The task as it predicts, where that takes more than what a validation computes."""
        return self

    def activations(self, batch: Batch, output: Output) -> tuple[Tensor, Tensor]:
        """Tokens of a batch, by their places counted through its rows, [tokens], and how strongly
        each feature fires on them, [tokens, features]; of a task that `finds_features`."""
        raise NotImplementedError

    def predictions(self, batch: Batch, output: Output) -> list[Any]:
        """What the model tells of each row of a batch."""
        raise NotImplementedError

    def join_predictions(
        self, pieces: Sequence[Any], given: Mapping[str, Any], untold: Sequence[int] = ()
    ) -> dict[str, Any]:
        """What is told of a record, from that of its rows in their order: `prediction`, and what
        goes with it. `untold`: `Encoded.untold` of the record; it is given where there is any."""
        (only,) = pieces
        return dict(only)

    def report(self, metrics: TaskMetrics) -> dict[str, dict[str, float]]:
        """Rows of a table that tells more than the metrics do, by what they are of."""
        found: dict[str, dict[str, float]] = getattr(metrics, "report", dict)()
        return found

    def scores(self, metrics: TaskMetrics) -> Scores | None:
        """What the model gave for each row, in the rows' order, as the metrics of them gathered it;
        None for metrics that keep sums alone. Metrics that have to be told to gather rows, or that
        need a row a batch to do so, have `gather_rows`, which says whether they need the latter."""
        tell = getattr(metrics, "scores", None)
        found: Scores | None = None if tell is None else tell(self.labels)
        return found

    def measured(self, metrics: TaskMetrics, held: Held | None) -> dict[str, float | None]:
        """The metrics of a whole validation by name; None for one whose value stands for nothing on
        its rows, or is not finite."""
        values, undefined = metrics.compute(), metrics.undefined()
        values = values if held is None else self.complete(values, held)
        return {
            name: None if name in undefined or not math.isfinite(value) else float(value)
            for name, value in values.items()
        }

    def complete(self, values: Mapping[str, float], held: Held) -> dict[str, float]:
        """The metrics of a whole validation, with those that need to know of its rows."""
        return dict(values)
