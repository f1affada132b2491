"""Which methods there are, and what `--with METHOD:key=value,…` means. Refuses unknown methods and
settings, and what comes after weights have become codes.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import pairwise

from pydantic import ValidationError

from dray.errors import SpecError
from dray.release.compress.distil import Distil
from dray.release.compress.fp8 import Fp8
from dray.release.compress.half import Bf16, Fp16
from dray.release.compress.heads import Heads
from dray.release.compress.int4 import Int4
from dray.release.compress.int8 import Int8
from dray.release.compress.int8_dynamic import Int8Dynamic
from dray.release.compress.int8_static import Int8Static
from dray.release.compress.layers import Layers
from dray.release.compress.magnitude import Magnitude
from dray.release.compress.method import Method
from dray.release.compress.movement import Movement
from dray.release.compress.two_four import TwoFour
from dray.release.compress.width import Width
from dray.spec import BadYaml, read_yaml

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(Layers, Width, Heads, Distil, Magnitude, Movement, TwoFour),
        *(Bf16, Fp16, Int8, Int8Dynamic, Int8Static, Int4, Fp8),
    )
}


def make_methods(wanted: Sequence[str]) -> list[Method]:
    """The methods of a command, in order. Raises SpecError."""
    if not wanted:
        raise SpecError(
            "compress", "no method is given", "at least one changes the model", "--with int8"
        )
    found = [_make_method(text) for text in wanted]
    for before, after in pairwise(found):
        if before.packs:
            raise SpecError(
                f"--with {after.name}",
                f"comes after {before.name}",
                "weights that have become codes cannot be changed",
                f"put {before.name} last" if not after.packs else f"leave {before.name} out",
            )
    return found


def _make_method(text: str) -> Method:
    name, _, rest = text.partition(":")
    kind = METHODS.get(name)
    if kind is None:
        near = difflib.get_close_matches(name, METHODS, n=1)
        raise SpecError(
            f"--with {name}",
            "is no method",
            f"there are {', '.join(METHODS)}",
            f"did you mean {near[0]}?" if near else "",
        )
    given: dict[str, object] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise SpecError(f"--with {name}", f"{part!r} has no value", "settings are key=value")
        try:
            given[key] = read_yaml(value)
        except BadYaml as error:
            raise SpecError(f"--with {name}", f"{part!r}: {error}") from error
    try:
        return kind(kind.Settings.model_validate(given))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        known = ", ".join(kind.Settings.model_fields) or "none"
        what = f"{key} = {given.get(key)}: " if key in given else f"{key}: " if key else ""
        raise SpecError(
            f"--with {name}",
            f"{what}{first['msg'][0].lower()}{first['msg'][1:]}",
            f"its settings are {known}",
        ) from error
