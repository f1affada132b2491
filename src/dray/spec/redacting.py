"""What a spec says of personal data: which kinds are looked for in texts, and what becomes of
them.

A key is never in a spec, only the name of the environment variable that holds it.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dray.spec.releasing import OneOrMore, as_several
from dray.spec.sections import Section

PATTERNED = ("email", "phone", "card", "iban", "cn_id", "us_ssn", "ip", "key")
"""Kinds that are told by their form; names are told by a model alone."""

Kind = Literal["email", "phone", "card", "iban", "cn_id", "us_ssn", "ip", "key", "name"]
Region = Annotated[str, Field(pattern="^[A-Z]{2}$")]


class Redaction(Section):
    """Personal data that is taken out of texts. A form can be recognised, a person cannot: it is no
    guarantee (docs/privacy.md says what is missed)."""

    mode: Literal["mask", "pseudonym", "drop"] = "mask"
    """`mask` puts `[EMAIL]` in the place of an address, `pseudonym` `[EMAIL-3f9a0c2e]`, the same
    for the same address everywhere under one key; `drop` leaves the document out."""
    kinds: Annotated[tuple[Kind, ...], BeforeValidator(as_several), OneOrMore, Field(min_length=1)]\
        = PATTERNED  # type: ignore[assignment]
    """What is looked for: e-mail addresses, phone numbers, payment cards, IBANs, Chinese resident
    ids, US social security numbers, public IP addresses, keys and tokens; and `name`, which needs
    `names`."""
    regions: Annotated[
        tuple[Region, ...], BeforeValidator(as_several), OneOrMore, Field(min_length=1)
    ] = ("US", "GB", "CN", "DE", "FR")
    """Where phone numbers without a country code may be from (ISO 3166), the likeliest first."""
    names: str | None = None
    """Folder of a spaCy pipeline that tells persons, or `python:PACKAGE/PATH` in an installed
    package; nothing is downloaded."""
    pseudonym_key: Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_]*$")] = "DRAY_PSEUDONYM_KEY"
    """Name of the environment variable that holds the key of pseudonyms."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if twice := next((kind for kind in self.kinds if self.kinds.count(kind) > 1), ""):
            raise ValueError(f"kinds names {twice} twice")
        if ("name" in self.kinds) != (self.names is not None):
            raise ValueError(
                "the kind `name` needs `names`, the folder of a spaCy pipeline"
                if self.names is None
                else "`names` is of the kind `name`, which `kinds` does not have"
            )
        return self
