"""The section `data`: sources, what becomes of their documents, and what is held out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dray.spec.filtering import Decontamination, Filters, FiltersChoice, LanguagesChoice
from dray.spec.sections import Float, Int, OneOrMore, Section, Share, as_several
from dray.spec.sources import ShortSources, Source, Sources, as_sources


class Near(Section):
    """When documents are near-duplicates: by MinHash signatures in bands (Broder 1997)."""

    similarity: Annotated[Float, Field(gt=0, le=1)] = 0.8
    """Least Jaccard similarity of their sets of shingles. Candidates are verified exactly."""
    shingle_words: Annotated[Int, Field(ge=1, le=64)] = 5
    """Words in a shingle; in scripts without spaces a character is a word."""
    permutations: Annotated[Int, Field(ge=1, le=4096)] = 128
    """Values in a signature."""
    bands: Annotated[Int, Field(ge=1)] = 16
    """Bands of a signature; documents with an equal one are candidates. More find more."""

    @model_validator(mode="after")
    def _banded(self) -> Self:
        if self.permutations % self.bands:
            raise ValueError(
                f"permutations {self.permutations} are no multiple of bands {self.bands}; "
                "all bands have the same number"
            )
        rows = self.permutations // self.bands
        found = 1 - (1 - self.similarity**rows) ** self.bands
        if found < 0.5:
            raise ValueError(
                f"{self.bands} bands of {rows} find documents of similarity {self.similarity} with "
                f"a probability of {found:.2g} only; give more bands"
            )
        return self


class Cleaning(Section):
    """What happens to a document's text before it is tokenised."""

    normalize: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode normalisation form."""
    min_chars: Annotated[Int, Field(ge=0)] = 1
    """Documents shorter than this are dropped."""
    max_chars: Annotated[Int, Field(ge=1)] | None = None
    """Documents longer than this are dropped."""
    min_alphanumeric_share: Share = 0.0
    """Least share of letters and digits (of any script) among the characters that are not white
    space."""
    max_repeated_line_share: Share = 1.0
    """Greatest share of characters that lie in lines already seen in the same document."""
    languages: Annotated[LanguagesChoice, Field(exclude_if=lambda given: given is None)] = None
    """Languages to keep, as a list or with `min_score`; none: whatever they are."""
    filters: Annotated[FiltersChoice, Field(exclude_if=lambda given: given == Filters())] = (
        Filters()
    )
    """Published rules for documents of the web: a list of names, or thresholds by name."""
    decontaminate: Annotated[
        Decontamination | None, Field(exclude_if=lambda given: given is None)
    ] = None
    """Evaluation sets that no training document may share text with."""
    deduplicate: Literal["exact", "near", "none"] = "exact"
    """`exact` keeps the first of documents whose normalised text is equal; `near`, besides, the
    first of those that are alike, directly or by way of others (`near`)."""
    near: Annotated[Near, Field(exclude_if=lambda given: given == Near())] = Near()
    """When documents are alike."""
    forget: Annotated[
        tuple[Annotated[str, Field(pattern="^[0-9a-f]{32}$")], ...],
        Field(exclude_if=lambda given: not given),
    ] = ()
    """Digests of documents that are left out, as `dray forget` tells them."""

    @model_validator(mode="after")
    def _alike(self) -> Self:
        if self.near != Near() and self.deduplicate != "near":
            raise ValueError("near: settings of `deduplicate: near`, which is not asked for")
        return self


DataKind = Literal["email", "phone", "card", "iban", "cn_id", "us_ssn", "ip", "key", "name"]
PATTERNED: tuple[DataKind, ...] = ("email", "phone", "card", "iban", "cn_id", "us_ssn", "ip", "key")
"""Kinds that are told by their form; names are told by a model alone."""

Region = Annotated[str, Field(pattern="^[A-Z]{2}$")]


class Redaction(Section):
    """Personal data that is taken out of texts. A form can be recognised, a person cannot: it is no
    guarantee (docs/privacy.md says what is missed)."""

    mode: Literal["mask", "pseudonym", "drop"] = "mask"
    """`mask` puts `[EMAIL]` in the place of an address, `pseudonym` `[EMAIL-3f9a0c2e]`, the same
    for the same address everywhere under one key; `drop` leaves the document out."""
    kinds: Annotated[
        tuple[DataKind, ...], BeforeValidator(as_several), OneOrMore, Field(min_length=1)
    ] = PATTERNED
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


def as_redaction(value: Any) -> Any:
    """`true` is one with all defaults, `false` is none."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class HeldOut(Section):
    """A share of the training documents held out for validation, split by document."""

    share: Annotated[Float, Field(gt=0, lt=1)]
    """Share of the documents; a document's side depends on its text alone."""


def _as_validation_data(value: Any) -> Any:
    if isinstance(value, Mapping) and "share" in value:
        if "path" in value:
            raise ValueError("either a `share` of the training documents or the `path` of others")
        return HeldOut.model_validate(dict(value))
    return value if isinstance(value, HeldOut) or value is None else as_sources(value)


class Data(Section):
    """The corpus: where documents come from and how they become rows."""

    train: Sources
    """The training documents: a path, a glob, a URI, a mapping with `path`, or a list of these."""
    validation: Annotated[
        HeldOut | tuple[Source, ...] | None, BeforeValidator(_as_validation_data), ShortSources
    ] = None
    """`{share: 0.02}` of the training documents, or sources of their own."""
    sequence_tokens: Annotated[Int, Field(ge=2, le=1_048_576)] = 512
    """Tokens in a row."""
    cleaning: Cleaning = Cleaning()
    """What happens to a document's text before it is tokenised."""
    balance: Annotated[Float, Field(ge=0, le=1), Field(exclude_if=lambda given: not given)] = 0.0
    """How far training evens out the labels of documents that have one each: a label is read in
    proportion to its rows to the power of 1 - balance. 0: as they are; 1: all alike. Every row of a
    label is read before one is read again."""
    redaction: Annotated[Redaction | None, Field(exclude_if=lambda given: given is None)] = None
    """Which personal data is taken out of texts before anything of them is kept or learnt; left
    out: none."""
    max_bad_share: Share = 0.01
    """Above this share of unreadable data, in records or in bytes, preparing stops and names the
    worst file. A file that is cut short counts whole."""
    max_record_bytes: Annotated[Int, Field(ge=1024)] = 16 * 1024 * 1024
    """A record (a line, or a file of format `text`) larger than this counts as unreadable."""
    shuffle_seed: Int = 0
    """Seed of the one shuffle of the rows on disk; another training seed reuses the token
    shards."""
