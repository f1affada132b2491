"""Requests to a real S3 server, counted, beside those that a plan speaks of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dray.corpus.manifest import SourceRows
from dray.corpus.shards import make_batch, read_groups, stored_columns, write_shard
from dray.plan.demands import COMMIT_GETS, COMMIT_PUTS, count_puts
from dray.runs import CheckpointWriter, apply_retention, create_run, make_fragment_key
from dray.storage.filesystem import open_filesystem
from dray.tasks.causal_lm import CausalLM
from failing_proxy import FailingProxy
from sharded_model import PLAN, make_test_spec


def take_counts(proxy: FailingProxy) -> tuple[int, int]:
    """Writes and listings, and reads, since the last look; deletions cost nothing."""
    asked = [
        method != "GET" or "list-type" in path or "prefix=" in path
        for method, path in proxy.requests
        if method in ("GET", "PUT", "POST", "HEAD")
    ]
    heads = sum(method == "HEAD" for method, _ in proxy.requests)
    proxy.requests.clear()
    return sum(asked) - heads, len(asked) - sum(asked) + heads


@pytest.mark.parametrize(("num_ranks", "megabytes"), [(1, 1), (4, 1), (2, 25)])
def test_a_checkpoint(
    proxy: FailingProxy, failing_storage: str, num_ranks: int, megabytes: int
) -> None:
    """The third one, after which the first is deleted."""
    run = create_run(failing_storage, "counted", make_test_spec(), PLAN)
    attempt, length = run.begin_attempt(num_ranks, 0), megabytes * 2**20 // 4
    puts = gets = 0
    for step in (1, 2, 3):
        take_counts(proxy)
        files = [
            CheckpointWriter(run, step, attempt).write_rank(
                rank,
                num_ranks,
                {make_fragment_key("p", "param", rank * length): torch.zeros(length)},
            )
            for rank in range(num_ranks)
        ]
        metadata = {"shapes": {"p": [length * num_ranks]}, "num_ranks": num_ranks}
        CheckpointWriter(run, step, attempt).commit(files, metadata)
        apply_retention(run, 2, 0, "loss", sign=1)
        puts, gets = take_counts(proxy)
    assert puts == num_ranks * (count_puts(files[0].num_bytes) + 1) + COMMIT_PUTS
    assert gets == num_ranks + COMMIT_GETS


def test_a_token_shard(proxy: FailingProxy, failing_storage: str) -> None:
    """Written in parts; a group of one that is open is one request, else three more."""
    filesystem, path = open_filesystem(failing_storage)
    columns, num_rows = stored_columns(CausalLM(), 2048, "uint16", 0), 3072
    values = {
        "input_ids": np.zeros((num_rows, 2048), np.uint16),
        "num_tokens": np.zeros(num_rows, np.int32),
    }
    shard = write_shard(filesystem, path, "x.arrow", make_batch(columns, values), 256)
    assert take_counts(proxy) == (count_puts(shard.num_bytes), 0)
    source = SourceRows(
        name="x",
        weight=None,
        num_rows=num_rows,
        num_documents=1,
        num_tokens=1,
        num_text_bytes=1,
        shards=(shard,),
    )
    read_groups(filesystem, path, source, [0], 256)
    assert take_counts(proxy) == (0, 4)
    read_groups(filesystem, path, source, [5, 9], 256)
    assert take_counts(proxy) == (0, 2)
