"""Masks and pseudonyms: which of two finds wins, that nothing changes the second time, and that
records stay records."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dray.corpus.records import dump_record
from dray.corpus.redacting import Redactor, make_redactor, told_counts
from dray.errors import SpecError
from dray.spec import Redaction

KEY = "a key of pseudonyms 4711"
PIECES = (
    "anna@example.com", "+49 30 1234567", "(212) 555-0123", "13800138000", "4111 1111 1111 1111",
    "DE89 3704 0044 0532 0130 00", "11010519491231002X", "219-09-9998", "93.184.216.34",
    "AKIAIOSFODNN7EXAMPLE", "password=", "hunter22x", "tel ", "ip ", "[EMAIL]", "[PHONE-0123abcd]",
    "[", "]", "@", ".", "-", "+", " ", "\n", '"', "\\", "1", "23", "4567", "a",
    "example.com", "号", "０",
)  # fmt: skip
"""What makes texts with identifiers, halves of them, and marks between."""
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
QUICK = settings(max_examples=150, deadline=None)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAY_PSEUDONYM_KEY", KEY)


def redactor(**given: object) -> Redactor:
    found = make_redactor(Redaction.model_validate(given))
    assert found is not None
    return found


MASK = make_redactor(Redaction())
assert MASK is not None


@QUICK
@given(TEXTS, st.sampled_from(["mask", "pseudonym"]))
def test_redacting_twice_changes_nothing_more(text: str, mode: str) -> None:
    one = Redactor(Redaction.model_validate({"mode": mode}), b"key" if mode != "mask" else None)
    found, counts = one.redact(text)
    assert one.redact(found) == (found, Counter())
    assert bool(counts) == (found != text)
    assert not one.find(found)


@QUICK
@given(
    st.recursive(
        TEXTS | st.integers(10**6, 10**12) | st.booleans() | st.none() | st.floats(-9, 9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=6,
    )
)
def test_a_record_stays_json_of_the_same_shape(value: object) -> None:
    assert MASK is not None
    found, counts = MASK.redact_json(dump_record(value))
    tree = json.loads(found)  # no mask is inside an escape
    assert shape(tree, numbers=False) == shape(value, numbers=False)
    assert dump_record(tree) == found
    assert bool(counts) == (tree != json.loads(dump_record(value)))
    assert MASK.redact_json(found) == (found, Counter())


def shape(value: object, *, numbers: bool) -> object:
    if isinstance(value, dict):
        return [shape(item, numbers=numbers) for item in value.values()]
    return [shape(item, numbers=numbers) for item in value] if isinstance(value, list) else None


def test_what_says_most_wins() -> None:
    one = redactor()
    for text, masked in {
        "IBAN DE89 3704 0044 0532 0130 00.": "IBAN [IBAN].",  # its digits may be a card or a phone
        "tel 4111 1111 1111 1111": "tel [CARD]",
        "https://u:pa55w0rd@example.com/x": "https://u:[KEY]@example.com/x",
        "password=anna1@example.com": "password=[KEY]",
        "tel. 192.168.100.200": "tel. 192.168.100.200",
        "a@example.com,b@example.com": "[EMAIL],[EMAIL]",
    }.items():
        assert one.redact(text)[0] == masked
        assert one.redact(masked)[0] == masked


def test_a_pseudonym_is_the_same_wherever_it_is_written() -> None:
    one = redactor(mode="pseudonym")
    found, counts = one.redact("Anna@example.com ANNA@EXAMPLE.COM +49 30 1234567 (tel 030 1234567)")
    words = found.replace("(tel", "").replace(")", "").split()
    assert words[0] == words[1] != words[2] == words[3]
    assert words[2].startswith("[PHONE-")
    assert counts == {"email": 2, "phone": 2}
    assert redactor(mode="pseudonym").redact("anna@example.com")[0] == words[0]
    copy = pickle.loads(pickle.dumps(one))
    assert copy.redact("anna@example.com")[0] == words[0]
    assert KEY not in repr(one)
    assert "key" not in repr(one).replace("pseudonym_key", "").replace("'key'", "")


def test_another_key_makes_other_pseudonyms_and_another_digest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = redactor(mode="pseudonym")
    monkeypatch.setenv("DRAY_PSEUDONYM_KEY", KEY + "!")
    second = redactor(mode="pseudonym")
    assert first.redact("anna@example.com") != second.redact("anna@example.com")
    assert first.digest() != second.digest()
    assert redactor().digest() == redactor(kinds=[*reversed(Redaction().kinds)]).digest()
    assert redactor().digest() != redactor(kinds="email").digest()
    assert redactor().digest() != redactor(regions="FR").digest()


def test_words_keep_their_number_and_a_find_may_be_in_several() -> None:
    one = redactor()
    words = ["call", "+49", "30", "1234567", ",", "or", "<anna@example.com>", "now"]
    found, counts = one.redact_words(words)
    assert found == ["call", "[PHONE]", "[PHONE]", "[PHONE]", ",", "or", "<[EMAIL]>", "now"]
    assert counts == {"phone": 1, "email": 1}
    assert one.redact_words(found) == (found, Counter())


def test_fields_of_a_record_are_looked_at_as_they_are_meant() -> None:
    one = redactor()
    text = dump_record(
        {
            "a": 'x\ny@example.org\t"q"',
            "phone": 13800138000,
            "at": 1700000000,
            "db_password": "abc123def",
            "k@example.org": 1,
            "l@example.org": [True, None, 1.5],
        }
    )
    found, counts = one.redact_json(text)
    assert json.loads(found) == {
        "a": 'x\n[EMAIL]\t"q"',
        "phone": "[PHONE]",
        "at": 1700000000,
        "db_password": "[KEY]",
        "[EMAIL]": 1,
        "[EMAIL] 2": [True, None, 1.5],
    }
    assert counts == {"email": 3, "phone": 1, "key": 1}
    assert told_counts(counts) == "3 e-mail addresses, 1 phone number, 1 key or token"
    plain = dump_record({"a": "nothing", "n": 1e300})
    assert one.redact_json(plain) == (plain, Counter())


def test_settings_that_cannot_work_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("DRAY_PSEUDONYM_KEY", "short")
    with pytest.raises(SpecError, match="too short"):
        redactor(mode="pseudonym")
    with pytest.raises(SpecError, match=r"OTHER.*is not set"):
        redactor(mode="pseudonym", pseudonym_key="OTHER")
    for given_wrong, message in (
        ({"kinds": ["name"]}, "needs `names`"),
        ({"names": "folder"}, "does not have"),
        ({"kinds": ["email", "email"]}, "twice"),
        ({"kinds": []}, "at least 1"),
        ({"regions": ["Germany"]}, "pattern"),
        ({"pseudonym_key": "a key itself"}, "pattern"),
    ):
        with pytest.raises(ValueError, match=message):
            Redaction.model_validate(given_wrong)


def test_names_want_a_pipeline_that_lies_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dray.processes.imports.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"spacy is not installed.*dray\[names\]"):
        redactor(kinds=["name"], names="nowhere")
    with pytest.raises(SpecError, match=r"phonenumbers is not installed.*dray\[privacy\]"):
        redactor()
    monkeypatch.setattr("dray.processes.imports.find_spec", lambda name: name)
    with pytest.raises(SpecError, match="no folder of a spaCy pipeline"):
        redactor(kinds=["name"], names="nowhere")


def test_names_are_what_a_pipeline_tells(tmp_path: Path) -> None:
    """Of rules here, since no model of names comes with a package."""
    spacy = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    ruler = pipeline.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PERSON", "pattern": "Anna Schmidt"}])
    pipeline.to_disk(tmp_path / "names")
    one = redactor(kinds=["email", "name"], names=str(tmp_path / "names"))
    found, counts = one.redact("Anna Schmidt (anna@example.com) and Anna Schmidt")
    assert (found, counts) == ("[NAME] ([EMAIL]) and [NAME]", {"name": 2, "email": 1})
    spacy.blank("en").to_disk(tmp_path / "none")
    other = redactor(kinds="name", names=str(tmp_path / "none"))
    assert one.digest() != other.digest()
    with pytest.raises(SpecError, match="tells no names"):
        other.find("Anna")
