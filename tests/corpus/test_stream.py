"""The stream: what Ray Data hands to the ranks is what the order asks for, block by block."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import cloudpickle

from dray.corpus.prepare import Corpus, prepare
from dray.corpus.stream import (
    RowStream,
    build_dataset,
    build_datasource,
    check_rows,
    iterate_windows,
    read_rows,
)
from dray.errors import CorpusError
from dray.order import PADDING
from dray.spec import make_spec
from random_corpus import build_random_corpus
from tiny import tiny_tree


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path, local_ray: None) -> Corpus:
    tree = tiny_tree(
        tiny_corpus,
        data={
            "train": [
                {"path": f"{tiny_corpus}/part-{n}.jsonl", "weight": w}
                for n, w in ((0, 1.0), (1, 3.0))
            ],
            "validation": {"path": f"{tiny_corpus}/part-2.jsonl"},
        },
    )
    return prepare(make_spec(tree), str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def random_corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_random_corpus(tmp_path_factory.mktemp("random"), [150, 70])


def make_stream(corpus: Corpus, **fields: Any) -> RowStream:
    settings: dict[str, Any] = {
        "folder": corpus.folder,
        "key": corpus.manifest.key,
        "seed": 3,
        "global_rows": 12,
        "num_ranks": 2,
        "rows_per_rank": 6,
        "micro_rows": 3,
        "start_step": 0,
        "num_steps": 30,
        "validate_every": 20,
        "max_validation_rows": 25,
    }
    return RowStream(**settings | fields)


def rows_by_step(stream: RowStream) -> dict[int, list[int]]:
    """The global batch of every step as the ranks see it."""
    steps: dict[int, list[int]] = {}
    for rank in range(stream.num_ranks):
        for segment, block in check_rows(stream, stream.blocks(rank), rank):
            if segment.kind == "train":
                ids = block.column("row_id").to_numpy().reshape(-1, stream.rows_per_rank)
                for step, row in zip(range(segment.first, segment.last + 1), ids, strict=True):
                    steps.setdefault(step, []).extend(int(i) for i in row if i != PADDING)
    return {step: sorted(rows) for step, rows in steps.items()}


def test_ray_data_hands_each_rank_its_blocks_in_order(corpus: Corpus):
    """Over several windows, with parts of validation passes between the steps."""
    stream = make_stream(corpus, block_bytes=1, num_steps=80, window_tasks=1)
    assert len(list(stream.windows())) == 4
    splits = build_dataset(stream).streaming_split(stream.num_ranks, equal=True)
    received: dict[int, list[pa.Table]] = {}

    def consume(rank: int) -> None:
        blocks = iterate_windows(
            stream, lambda: splits[rank].iter_batches(batch_size=None, batch_format="pyarrow")
        )
        received[rank] = [block for _, block in check_rows(stream, blocks, rank)]

    threads = [threading.Thread(target=consume, args=(rank,)) for rank in range(stream.num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(stream.num_ranks):
        expected = list(stream.blocks(rank))
        assert len(received[rank]) == len(expected)
        for block, other in zip(received[rank], expected, strict=True):
            assert block.select(other.column_names).equals(other)


@pytest.mark.parametrize(
    ("num_ranks", "rows_per_rank", "micro_rows"), [(1, 12, 4), (3, 4, 2), (5, 3, 1), (8, 2, 2)]
)
def test_any_number_of_ranks_reads_the_same_global_batches(
    corpus: Corpus, num_ranks: int, rows_per_rank: int, micro_rows: int
):
    other = make_stream(
        corpus, num_ranks=num_ranks, rows_per_rank=rows_per_rank, micro_rows=micro_rows
    )
    assert rows_by_step(other) == rows_by_step(make_stream(corpus))


@settings(max_examples=40, deadline=None)
@given(
    left_out=st.sets(st.integers(0, 40), max_size=12),
    num_ranks=st.integers(1, 16),
    micro_rows=st.integers(1, 3),
    start_step=st.integers(0, 29),
)
def test_left_out_batches_are_never_read(
    random_corpus: Corpus, left_out: set[int], num_ranks: int, micro_rows: int, start_step: int
):
    """From any step on, at any number of ranks: the batches of the endless sequence but for those
    left out."""
    whole = rows_by_step(make_stream(random_corpus, num_ranks=1, rows_per_rank=12, num_steps=80))
    kept = [batch for batch in range(80) if batch not in left_out]
    found = rows_by_step(
        make_stream(
            random_corpus,
            left_out=tuple(sorted(left_out)),
            num_ranks=num_ranks,
            micro_rows=micro_rows,
            rows_per_rank=-(-12 // (num_ranks * micro_rows)) * micro_rows,
            start_step=start_step,
        )
    )
    assert found == {step: whole[kept[step - 1] + 1] for step in range(start_step + 1, 31)}


def test_a_stream_from_the_middle_is_the_rest_of_the_whole(corpus: Corpus):
    whole, rest = make_stream(corpus), make_stream(corpus, start_step=17)
    assert rows_by_step(rest) == {
        step: rows for step, rows in rows_by_step(whole).items() if step > 17
    }


def test_rows_hold_what_the_shards_hold(corpus: Corpus):
    split = corpus.manifest.train
    table = read_rows(corpus.folder, corpus.manifest, split, np.arange(split.num_rows))
    assert table.num_rows == split.num_rows
    assert int(np.sum(table.column("num_tokens").to_numpy())) == split.num_tokens
    backwards = read_rows(
        corpus.folder, corpus.manifest, split, np.arange(split.num_rows)[::-1].copy()
    )
    last = table.slice(split.num_rows - 1).column("input_ids")
    assert backwards.slice(0, 1).column("input_ids").to_pylist() == last.to_pylist()


def test_validation_rows_are_read_once_each(corpus: Corpus):
    stream = make_stream(corpus, num_ranks=3, rows_per_rank=4, micro_rows=4)
    parts = [
        segment
        for segment in stream.segments()
        if segment.kind == "validation" and segment.first == 20
    ]
    ids = [
        int(i)
        for rank in range(3)
        for part in parts
        for i in stream.row_ids(part, rank)
        if i != PADDING
    ]
    assert sorted(ids) == list(range(25))


def test_a_consumer_that_stops_ends_the_thread_that_goes_ahead(corpus: Corpus):
    stream = make_stream(corpus, block_bytes=1)
    before = threading.active_count()
    blocks = iterate_windows(stream, lambda: stream.blocks(0))
    next(blocks)
    blocks.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_error_behind_the_stream_is_raised_where_blocks_are_consumed(corpus: Corpus):
    def fail() -> Iterator[pa.Table]:
        yield from stream.blocks(0)
        raise OSError("the node is gone")

    stream = make_stream(corpus, num_steps=2, validate_every=None)
    with pytest.raises(OSError, match="the node is gone"):
        list(iterate_windows(stream, fail))


@pytest.mark.parametrize("num_steps", [3000, 3_000_000])
def test_what_ray_is_given_grows_neither_with_the_run_nor_with_the_corpus(
    tmp_path: Path, num_steps: int
):
    """A corpus of some shards and one of hundreds: the read tasks are as large, and no more of them
    are planned."""
    sizes = []
    for name, num_rows in (("small", 100), ("large", 32 * 3 * 300)):
        large = build_random_corpus(tmp_path / name, [num_rows])
        stream = make_stream(large, block_bytes=1, num_steps=num_steps)
        tasks = build_datasource(stream).get_read_tasks(1, data_context=object())
        assert len(tasks) == 2048
        sizes.append({len(cloudpickle.dumps(task)) for task in tasks[::256]})
    assert max(max(found) for found in sizes) < 3000
    assert max(sizes[1]) - max(sizes[0]) < 50


def test_short_segments_share_a_block(corpus: Corpus):
    """Steps that are validated one by one: each gets the rows that it would read alone."""
    stream = make_stream(corpus, validate_every=1)
    segments = list(stream.segments())
    assert [len(load) for load in stream.loads()] == [32, 28]
    for rank in range(stream.num_ranks):
        received = list(check_rows(stream, stream.blocks(rank), rank))
        assert [segment for segment, _ in received] == segments
        for segment, rows in received:
            assert rows.equals(stream.read_block((segment,), rank))


def test_blocks_are_bounded_in_bytes_however_long_the_run(random_corpus: Corpus):
    stream = make_stream(random_corpus, global_rows=4096, rows_per_rank=2048, num_steps=10**7)
    row_bytes = 16 * 2 + 24
    for load in islice(stream.loads(), 100):
        assert sum(map(stream.rows_of, load)) * row_bytes <= stream.block_bytes


def test_a_corpus_that_is_not_the_runs_own_is_refused(random_corpus: Corpus):
    with pytest.raises(CorpusError, match="the run reads the corpus other"):
        make_stream(random_corpus, key="other").order  # noqa: B018


def test_a_stream_out_of_order_is_refused(corpus: Corpus):
    stream = make_stream(corpus)
    other = replace(stream, seed=4)
    with pytest.raises(RuntimeError, match="out of order"):
        list(check_rows(stream, other.blocks(0), 0))
    with pytest.raises(RuntimeError, match="ended before"):
        list(check_rows(stream, [], 0))
