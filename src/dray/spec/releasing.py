"""What is done with a run once it is trained: sections that `dray release` goes by.

All of them are places: they change nothing of the run, and may change at any time. Which methods of
compression there are is not known here (`release.compress.methods`).
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dray.spec.data import Redaction, as_redaction
from dray.spec.sections import Float, Int, OneOrMore, OrTrue, RunName, Section, as_pair, as_several

Of = Literal["trained", "compressed"]
"""Which model: the one that was trained, or what compressing made of it."""


def _read_drop(value: Any) -> Any:
    """A number, or a share with its sign."""
    if isinstance(value, str):
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?%", value):
            raise ValueError("a number from 0 on, or a share such as 5%, is wanted")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e300:
        raise ValueError("a number from 0 on, or a share such as 5%, is wanted")
    return float(value)


Drop = Annotated[float | str, BeforeValidator(_read_drop)]


class Evaluate(Section):
    """Which checkpoint is released, and how good it must be."""

    step: Annotated[Int, Field(ge=0)] | Literal["best", "newest"] | None = None
    """A step, `best` by `validation.metric`, or `newest`. None: the best where the spec has
    `data.validation`, else the newest."""
    data: Annotated[tuple[str | dict[str, Any], ...], BeforeValidator(as_several), OneOrMore] = ()
    """Other data to measure on, as `dray evaluate --data` takes it. None: the validation rows."""
    gate: Annotated[dict[str, Float], Field(default_factory=dict)]
    """Of metrics, the least that is good enough where higher is better, the most where lower is:
    `{accuracy: 0.8}`. Where one does not hold nothing after it is done."""

    @property
    def words(self) -> list[str]:
        """Its data as `dray evaluate --data` takes them."""
        return [one if isinstance(one, str) else json.dumps(one) for one in self.data]


class Compress(Section):
    """A smaller or faster run from the one that was trained."""

    methods: Annotated[tuple[str, ...], BeforeValidator(as_several), OneOrMore, Field(min_length=1)]
    """`METHOD` or `METHOD:key=value,…` in their order, as `dray compress --with` takes them."""
    max_drop: Annotated[dict[str, Drop], Field(default_factory=dict)]
    """By how much metrics may get worse: `{accuracy: 0.01}`, or a share of what it was,
    `{perplexity: 5%}`. Where one does not hold nothing is kept."""
    name: RunName | None = None
    """Of the new run. None: the run's and the methods'."""


class Export(Section):
    """A folder for others."""

    folder: Annotated[str, Field(min_length=1)]
    """Where it is written; `{run}` and `{step}` in it are the exported run's."""
    format: Literal["folder", "onnx", "gguf"] = "folder"
    """A Hugging Face folder, an ONNX graph, or a GGUF file."""
    values: Literal["f32", "f16", "bf16", "q8_0"] = "f16"
    """How a GGUF file holds the numbers of matrices."""
    license: str = "unknown"
    """What the card says, as the hub knows it."""
    sign: str | None = None
    """File of the private key that signs the list of files: Ed25519, as PEM."""
    of: Of | None = None
    """None: the compressed model where there is one."""

    @model_validator(mode="after")
    def _fills(self) -> Self:
        for name in re.findall(r"\{([^}]*)\}", self.folder):
            if name not in ("run", "step"):
                raise ValueError(f"{{{name}}} in a folder's name: it may have {{run}} and {{step}}")
        return self


class Serve(Section):
    """Where the model answers."""

    name: RunName | None = None
    """By which requests name it. None: the run's."""
    of: Of | None = None
    """None: the compressed model where there is one."""
    host: str = "127.0.0.1"
    """Where it listens; elsewhere than on loopback it asks for a key."""
    port: Annotated[Int, Field(gt=0, lt=65_536)] = 8000
    """The port."""
    replicas: Annotated[
        Annotated[Int, Field(ge=1)]
        | tuple[Annotated[Int, Field(ge=1)], Annotated[Int, Field(ge=1)]],
        BeforeValidator(as_pair),
    ] = 1
    """How many of them answer; `[fewest, most]`: as many as are asked for, within that."""
    log: str | None = None
    """A file that gets a line of JSON a request, without what was asked or answered."""
    feedback: RunName | None = None
    """A dataset of the storage that keeps what people say of answers. None: nobody is asked."""
    redact: Annotated[
        Redaction | None,
        BeforeValidator(as_redaction),
        OrTrue,
        Field(exclude_if=lambda given: given is None),
    ] = None
    """Which personal data is taken out of what is asked before the model sees it, and out of the
    log: `true` (masks for all that has a form), or a mapping as of `data.redaction`, whose `drop`
    refuses the request."""
    tls_cert: str | None = None
    """File of a certificate, PEM: HTTPS in the place of HTTP."""
    tls_key: str | None = None
    """File of its key, PEM."""

    @property
    def scheme(self) -> str:
        """Of its addresses."""
        return "http" if self.tls_cert is None else "https"

    @property
    def range(self) -> tuple[int, int]:
        """The fewest and the most replicas."""
        return (self.replicas,) * 2 if isinstance(self.replicas, int) else self.replicas

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.range[0] > self.range[1]:
            raise ValueError(f"replicas {list(self.range)}: the first must not exceed the second")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together; give both or neither")
        return self


STAGES = ("prepare", "train", "evaluate", "compress", "export", "promote", "serve")
"""What `dray release` does, in this order: where its section is given, from the third on. Promoting
is a part of serving."""
