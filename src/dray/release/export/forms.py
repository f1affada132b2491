"""What a form of an export is, and what it says of what it wrote."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dray.errors import SpecError
from dray.spec import Spec

if TYPE_CHECKING:
    from dray.release.trained import Trained

NAMES = ("folder", "onnx", "gguf")
VALUES = ("f32", "f16", "bf16", "q8_0")
"""How a GGUF file may hold the numbers of matrices."""
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+() -]{0,99}")


@dataclass(frozen=True)
class Options:
    """What of an export is chosen."""

    form: str = "folder"
    """One of NAMES."""
    adapters_alone: bool = False
    """Adapters without their base, instead of merged into it."""
    values: str = "f16"
    """One of VALUES, of a GGUF file."""
    license: str = "unknown"
    """What the card says."""
    key_file: str | None = None
    """Of the private key that signs the manifest."""

    def told(self) -> dict[str, str]:
        """What a manifest says of them."""
        form = "adapters" if self.adapters_alone else self.form
        values = {"values": self.values} if self.form == "gguf" else {}
        return {"format": form, "license": self.license, **values}


@dataclass(frozen=True)
class Check:
    """Something that was compared before the folder appeared."""

    what: str
    largest_difference: float | None = None
    """Of any logit, where logits were compared."""
    allowed: float | None = None
    """The largest that would not have ended the export."""
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        told = {
            "what": self.what,
            "largest_difference": self.largest_difference,
            "allowed": self.allowed,
        }
        return {name: value for name, value in told.items() if value is not None} | dict(
            self.details
        )


@dataclass(frozen=True)
class Written:
    """What a form has written."""

    checks: tuple[Check, ...]
    library: str
    """What reads it, as the hub calls it."""
    code: str
    """Lines of Python that load it and ask it something, run in its folder."""
    remarks: tuple[str, ...] = ()
    """What somebody should know who uses it."""


@dataclass(frozen=True)
class Form:
    """A form of exports."""

    check: Callable[[Trained, Options], None]
    """Raises UserError for a run that it cannot hold, before its model is read."""
    write: Callable[[Trained, Path, Options], Written]
    """Writes into an empty folder, which holds the tokeniser already, and checks what it wrote.
    Raises UserError."""
    copies: float
    """What it takes on the disk while it is written, as copies of the model in fp32."""
    suits: Callable[[Spec], None] = lambda spec: None
    """Raises SpecError for a spec none of whose runs it can hold, before there is one."""


def check_options(options: Options) -> None:
    """Raise SpecError for choices that do not go together."""
    if options.form not in NAMES:
        raise SpecError("--format", f"{options.form} is none", f"it is {', '.join(NAMES)}")
    if options.values not in VALUES:
        raise SpecError("--values", f"{options.values} is none", f"it is {', '.join(VALUES)}")
    if options.values != Options().values and options.form != "gguf":
        raise SpecError(
            f"--values {options.values}",
            f"does not go with --format {options.form}",
            "they are of a GGUF file",
            "give --format gguf, or leave them out",
        )
    if options.adapters_alone and options.form != "folder":
        raise SpecError(
            "--adapters",
            f"does not go with --format {options.form}",
            "adapters alone are a folder that peft reads",
            "leave one of the two out",
        )
    if not _LICENSE.fullmatch(options.license):
        raise SpecError(
            "--license",
            f"{options.license[:100]!r} is no name of a licence",
            "the hub knows them by short names",
            "e.g. apache-2.0, mit, cc-by-4.0, other",
        )
