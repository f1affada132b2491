"""Documents of several records are the same however the records were cut and scattered."""

from __future__ import annotations

import itertools
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dray.corpus.gathering import join_records, make_records, plan_gathering
from dray.corpus.parts import CorpusSource, Part
from dray.corpus.reading import Span
from dray.corpus.sources import InputFile
from dray.corpus.whole_words import PAD, UNKNOWN, make_words_tokenizer
from dray.spec import Gather, Source
from dray.tasks.rows import FIRST_WORD, SEPARATOR, UNKNOWN_WORD

Record = tuple[str, float, str]


def table(records: list[Record], names: dict[str, str] | None = None) -> pa.Table:
    texts = pa.array([f"{by}{SEPARATOR}{name}" for by, _, name in records], pa.large_string())
    targets = pa.array([repr(order) for _, order, _ in records], pa.large_string())
    return make_records(texts, targets, names or {})


def documents(found: pa.Table, gather: Gather) -> tuple[dict[str, list[str]], int]:
    told: dict[str, list[str]] = {}
    dropped = 0
    for keys, texts, num_dropped in join_records(found, gather):
        dropped += num_dropped
        for key, text in zip(keys.to_pylist(), texts.to_pylist(), strict=True):
            assert key not in told
            told[key] = text.split(SEPARATOR)
    return told, dropped


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(
        st.tuples(
            st.sampled_from("abcdé"), st.integers(0, 4).map(float), st.sampled_from(["x", "y", "z"])
        ),
        min_size=1,
        max_size=40,
    ),
    leave_out=st.integers(0, 3),
    least=st.integers(1, 4),
)
def test_records_are_put_in_order_and_the_last_are_left_out(
    records: list[Record], leave_out: int, least: int
) -> None:
    gather = Gather(by="who", order="when", leave_out=leave_out, least=least)
    found, dropped = documents(table(records), gather)
    expected: dict[str, list[str]] = {}
    by_key = itertools.groupby(sorted(records, key=lambda r: (r[0], r[1])), key=lambda r: r[0])
    for key, own in by_key:  # sorted is stable: equal times stay as they were read
        names = [name for _, _, name in own]
        expected[key] = names[: max(0, len(names) - leave_out)]
    short = {key for key, names in expected.items() if len(names) < least}
    assert found == {key: names for key, names in expected.items() if key not in short}
    assert dropped == len(short)


def test_large_partitions_are_given_out_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [(str(key), float(place), f"{key}-{place}") for key in range(9) for place in range(5)]
    whole, _ = documents(table(records), Gather(by="a", order="b"))
    monkeypatch.setattr("dray.corpus.gathering.BATCH_RECORDS", 11)
    pieces = list(join_records(table(records), Gather(by="a", order="b")))
    assert len(pieces) > 3
    assert documents(table(records), Gather(by="a", order="b"))[0] == whole


def test_ids_get_their_names() -> None:
    found = table([("a", 1.0, "7"), ("a", 2.0, "8")], {"7": "Toy Story"})
    assert found.column("name").to_pylist() == ["Toy Story", "8"]


def test_a_source_that_gathers_is_read_by_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dray.corpus.gathering.PARTITION_BYTES", 100)
    files = [InputFile("/", f"/{name}", 150, "", "csv", "") for name in "abc"]
    plain = Source(path="a", columns={"items": "i"})
    sources = [
        CorpusSource("plain", "train", plain, "data.train.0"),
        CorpusSource(
            "apart", "train", plain.model_copy(update={"gather": Gather(by="u", order="t")}), ""
        ),
    ]
    parts = [Part(index, int(index > 0), (Span(file),)) for index, file in enumerate(files)]
    pieces, planned = plan_gathering(parts, sources)
    assert [(piece.index, piece.source, piece.num_partitions) for piece in pieces] == [
        (0, 1, 3),
        (1, 1, 3),
    ]
    assert [part.index for part in planned] == [0, 1, 2, 3]
    assert planned[0] == parts[0]
    assert [(part.partition, part.spans, part.scattered) for part in planned[1:]] == [
        (place, (), (0, 1)) for place in range(3)
    ]


def test_a_vocabulary_holds_the_most_frequent_words_each_a_token() -> None:
    from tokenizers import Tokenizer

    counts = Counter({"Toy Story (1995)": 3, "b": 5, "a": 3, "rare": 1, "": 9, PAD: 9})
    text = make_words_tokenizer(counts, 5)
    assert text == make_words_tokenizer(Counter(dict(reversed(counts.items()))), 5)
    tokenizer = Tokenizer.from_str(text)
    names = ["b", "Toy Story (1995)", "a", "rare"]
    ids = tokenizer.encode(SEPARATOR.join(names), add_special_tokens=False).ids
    assert ids == [FIRST_WORD, FIRST_WORD + 1, FIRST_WORD + 2, UNKNOWN_WORD]
    assert tokenizer.token_to_id(UNKNOWN) == UNKNOWN_WORD
