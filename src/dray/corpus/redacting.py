"""Personal data in texts: found by form or by a model, and replaced.

Of finds that overlap the one wins whose form says most (a checksum or a secret before an address,
that before a phone number, that before a name), of alike ones the longer. What stands between what
was replaced is looked at again by itself, so that redacting twice changes nothing more; what looks
like a mask stays. Finds nothing that is written in words, over several texts, or in pictures: no
guarantee.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any

from dray.corpus.identifiers import FINDERS, Find, fold, is_random_looking
from dray.corpus.person_names import digest_folder, find_names
from dray.corpus.phones import check_regions, find_phones
from dray.errors import SpecError
from dray.processes.imports import require_package
from dray.redaction import hide, names_secret
from dray.spec import Redaction
from dray.storage.packages import in_package

VERSION = 1
"""Raised when the same texts are redacted otherwise: it is a part of a corpus' key."""
SPECIFIC = (*FINDERS, "phone", "name")
"""Kinds, the most specific first."""
CALLED: Mapping[str, tuple[str, str]] = {
    "email": ("e-mail address", "e-mail addresses"),
    "phone": ("phone number", "phone numbers"),
    "card": ("card number", "card numbers"),
    "iban": ("IBAN", "IBANs"),
    "cn_id": ("Chinese resident id", "Chinese resident ids"),
    "us_ssn": ("US social security number", "US social security numbers"),
    "ip": ("IP address", "IP addresses"),
    "key": ("key or token", "keys and tokens"),
    "name": ("name", "names"),
}
"""One of a kind, and several, for people."""
_RANKS = {"email": 1, "us_ssn": 1, "ip": 1, "phone": 2, "name": 3}
"""Which finds win over others; all that has a checksum or is a secret is 0."""
_MASK = re.compile(rf"\[(?:{'|'.join(kind.upper() for kind in SPECIFIC)})(?:-[0-9a-f]{{8}})?\]")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{256,}={0,2}")
"""A value in a tree that is a file's bytes rather than a text."""
_LEAST_KEY = 16
"""Characters of a key of pseudonyms."""
Counts = Counter[str]


@dataclass(frozen=True)
class Redactor:
    """What takes personal data out of texts. The representation tells no key."""

    settings: Redaction
    key: bytes | None = field(default=None, repr=False)
    """Of pseudonyms, where it makes such."""
    names: str | None = None
    """The folder of the pipeline that tells names, where they are looked for."""

    @property
    def drops(self) -> bool:
        """Whether a text with finds is left out as a whole."""
        return self.settings.mode == "drop"

    def redact(self, text: str) -> tuple[str, Counts]:
        """The text with masks or pseudonyms, and how many of each kind there are."""
        finds = self.find(text)
        if not finds:
            return text, Counter()
        parts, end = [], 0
        for find in finds:
            parts += [text[end : find.start], self.mask(find)]
            end = find.end
        return "".join((*parts, text[end:])), Counter(find.kind for find in finds)

    def redact_words(self, words: Sequence[str]) -> tuple[list[str], Counts]:
        """As many words, of which those are masked that a find covers, alone or with others:
        a number may be written in several."""
        finds = self.find(" ".join(words))
        changed = list(words)
        begin = 0
        for place, word in enumerate(words):
            end, parts, last = begin + len(word), [], begin
            for find in finds:
                if find.start < end and begin < find.end:
                    parts += [word[last - begin : max(0, find.start - begin)], self.mask(find)]
                    last = min(end, find.end)
            changed[place] = "".join((*parts, word[last - begin :]))
            begin = end + 1
        return changed, Counter(find.kind for find in finds)

    def redact_tree(self, value: Any, *, numbers: bool = True) -> tuple[Any, Counts]:
        """A tree of JSON's values with all texts in it redacted, the names of fields too, and, with
        `numbers`, whole numbers that are identifiers."""
        counts: Counts = Counter()
        return self._walk(value, counts, numbers), counts

    def redact_json(self, text: str) -> tuple[str, Counts]:
        """JSON as `records.dump_record` writes it, redacted: its texts are looked at as they are
        meant, without escapes, and it stays JSON."""
        from dray.corpus.records import dump_record

        found, counts = self.redact_tree(json.loads(text))
        return (dump_record(found), counts) if counts else (text, counts)

    def _walk(self, value: Any, counts: Counts, numbers: bool) -> Any:
        if isinstance(value, str):
            if _BASE64.fullmatch(value):
                return value
            found, more = self.redact(value)
            counts.update(more)
            return found
        if isinstance(value, Mapping):
            changed: dict[str, Any] = {}
            for name, item in value.items():
                own, number = self._walk(name, counts, numbers), 2
                while own in changed:  # two names that had one mask
                    own, number = f"{self._walk(name, Counter(), numbers)} {number}", number + 1
                changed[own] = self._walk_field(name, item, counts, numbers)
            return changed
        if isinstance(value, (list, tuple)):
            return [self._walk(item, counts, numbers) for item in value]
        if numbers and isinstance(value, int) and not isinstance(value, bool):
            text = str(value)
            finds = self.find(text) if len(text) >= 7 else []
            if finds and (finds[0].start, finds[0].end) == (0, len(text)):
                counts[finds[0].kind] += 1
                return self.mask(finds[0])
        return value

    def _walk_field(self, name: str, item: Any, counts: Counts, numbers: bool) -> Any:
        """The name of a field may say what its value is."""
        if (
            "key" in self.settings.kinds
            and isinstance(item, str)
            and names_secret(name)
            and is_random_looking(item, name)
            and not _MASK.fullmatch(item)
        ):
            counts["key"] += 1
            return self.mask(Find(0, len(item), "key", item))
        return self._walk(item, counts, numbers)

    def mask(self, find: Find) -> str:
        """What stands for a find: a mask, or a pseudonym. Of 100,000 values about one pair has the
        same 32 bits."""
        if self.key is None:
            return f"[{find.kind.upper()}]"
        digest = hmac.new(self.key, f"{find.kind}:{find.value}".encode(), hashlib.sha256)
        return f"[{find.kind.upper()}-{digest.hexdigest()[:8]}]"

    def find(self, text: str) -> list[Find]:
        """What is in a text, in its order; none overlap."""
        folded = fold(text)
        named = find_names(self.names, text) if self.names is not None else []
        found: list[Find] = []
        pieces = list(_between([mask.span() for mask in _MASK.finditer(text)], 0, len(text)))
        while pieces:
            begin, end = pieces.pop()
            inside = [one for one in named if begin <= one.start and one.end <= end]
            piece = folded if end - begin == len(folded) else folded[begin:end]
            own = [
                Find(begin + one.start, begin + one.end, one.kind, one.value)
                for finder in self._finders
                for one in finder(piece)
            ]
            if chosen := _choose([*own, *inside]):
                found += chosen
                spans = sorted((one.start, one.end) for one in chosen)
                pieces += _between(spans, begin, end)
        return sorted(found, key=lambda one: one.start)

    @cached_property
    def _finders(self) -> list[Callable[[str], Iterator[Find]]]:
        regions = self.settings.regions
        found = [finder for kind, finder in FINDERS.items() if kind in self.settings.kinds]
        if "phone" in self.settings.kinds:
            found.append(lambda text: find_phones(text, regions))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_finders"}

    def digest(self) -> dict[str, Any]:
        """What decides over the texts that it makes: a part of a corpus' key. Of the key of
        pseudonyms it has a code of a fixed word."""
        settings = self.settings
        found: dict[str, Any] = {
            "version": VERSION,
            "mode": settings.mode,
            "kinds": sorted(settings.kinds),
        }
        if "phone" in settings.kinds:
            found |= {"regions": settings.regions, "phonenumbers": version("phonenumbers")}
        if self.key is not None:
            found["key"] = hmac.new(self.key, b"corpus", hashlib.sha256).hexdigest()
        if self.names is not None:
            found |= {"names": digest_folder(self.names), "spacy": version("spacy")}
        return found


def make_redactor(settings: Redaction | None, where: str = "data.redaction") -> Redactor | None:
    """What redacts as the settings say; None without any. `where`: they are. Raises SpecError where
    a library or the key of pseudonyms is missing, StoreError for a package that is."""
    if settings is None:
        return None
    if "phone" in settings.kinds:
        require_package("phonenumbers", "privacy", where)
        check_regions(settings.regions, where)
    names = None
    if settings.names is not None:
        require_package("spacy", "names", f"{where}.names")
        names = os.path.abspath(in_package(settings.names))  # a worker has another folder
        if not os.path.isfile(os.path.join(names, "config.cfg")):
            raise SpecError(
                f"{where}.names = {settings.names}",
                "is no folder of a spaCy pipeline (no config.cfg in it)",
                "names are told by a pipeline that lies on this machine; none is downloaded",
                "name the folder that `nlp.to_disk` wrote, or python:PACKAGE/FOLDER of one",
            )
    key = _read_key(settings, where) if settings.mode == "pseudonym" else None
    return Redactor(settings, key, names)


def _read_key(settings: Redaction, where: str) -> bytes:
    """The key that pseudonyms are made with: of the variable's, so that what workers are given is
    not that itself. Raises SpecError."""
    given = os.environ.get(settings.pseudonym_key, "").strip()
    if len(given) < _LEAST_KEY:
        raise SpecError(
            f"{where}.pseudonym_key = {settings.pseudonym_key}",
            f"the environment variable {'is too short' if given else 'is not set'}",
            "without a secret key whoever has a pseudonym finds its phone number by trying them "
            f"all; a key has {_LEAST_KEY} characters or more",
            f"export {settings.pseudonym_key}=$(openssl rand -hex 32), and keep it",
        )
    hide(given)
    return hmac.new(given.encode(), b"dray pseudonyms", hashlib.sha256).digest()


def told_counts(counts: Mapping[str, int]) -> str:
    """Counts by kind, for people: `1,204 e-mail addresses, 1 phone number`."""
    return ", ".join(
        f"{counts[kind]:,} {CALLED[kind][counts[kind] != 1]}" for kind in CALLED if counts.get(kind)
    )


def _choose(finds: Sequence[Find]) -> list[Find]:
    """Those that stay of finds that may overlap."""
    order = sorted(
        finds,
        key=lambda one: (
            _RANKS.get(one.kind, 0),
            one.start - one.end,
            SPECIFIC.index(one.kind),
            one.start,
        ),
    )
    chosen: list[Find] = []
    for one in order:
        if all(one.end <= other.start or other.end <= one.start for other in chosen):
            chosen.append(one)
    return chosen


def _between(spans: Sequence[tuple[int, int]], begin: int, end: int) -> Iterator[tuple[int, int]]:
    """What lies between spans."""
    for start, stop in spans:
        if begin < start:
            yield begin, start
        begin = stop
    if begin < end:
        yield begin, end
