"""The same first loss and the same weights, bit for bit, under ZeRO-3 in two processes and without
ZeRO in one."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from dray.models.build import num_parameters
from dray.models.groups import parameter_groups
from dray.spec import Spec
from ports import free_ports
from small_models import VOCAB, digest, small_model, small_spec, some_ids

ARCHITECTURES = ("llama", "gpt2", "bert", "modernbert", "distilbert", "gemma2")


def task_of(architecture: str) -> str:
    return "causal_lm" if architecture in ("llama", "gpt2") else "sequence_classification"


def first_loss(model: Any) -> float:
    ids = some_ids()
    logits = model(input_ids=ids).logits.float()
    if logits.dim() == 2:
        return float(logits.double().sum())
    return float(
        nn.functional.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1))
    )


def run_rank(rank: int, port: int, specs: list[tuple[str, Spec]], results: Any) -> None:
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_IGNORE_CUDA_DETECTION="1",
    )
    from dray.rank.engine import import_deepspeed

    deepspeed = import_deepspeed(
        "cpu"
    )  # without the collective that DeepSpeed compiles for half a minute
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3},
    }
    for key, spec in specs:
        config["bf16"] = {"enabled": key.startswith("bf16")}
        model = small_model(
            spec,
            constructing=deepspeed.zero.Init(config_dict_or_path=config),
            gathering=lambda parameters: deepspeed.zero.GatheredParameters(
                parameters, modifier_rank=0
            ),
        )
        assert all(
            parameter.numel() == 0 for parameter in model.parameters()
        )  # no rank holds any of it whole
        rotary = [b for name, b in model.named_buffers() if "inv_freq" in name]
        assert all(buffer.dtype == torch.float32 for buffer in rotary)
        groups = [len(group["params"]) for group in parameter_groups(model, 0.1)]
        count = num_parameters(model)
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            whole = {
                name: parameter.detach().clone() for name, parameter in model.named_parameters()
            }
        engine = deepspeed.initialize(model=model, config=config)[0]
        with torch.no_grad():
            results[key, rank] = (digest(whole), first_loss(engine), count, groups)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Models built here without ZeRO, and what two ranks made of the same specs under ZeRO-3."""
    specs = [(name, small_spec(name, task_of(name))) for name in ARCHITECTURES]
    here = {key: small_model(spec) for key, spec in specs}
    folder: Path = tmp_path_factory.mktemp("models") / "llama"
    here["llama"].save_pretrained(folder)
    for task in ("causal_lm", "sequence_classification"):
        specs.append((f"folder {task}", small_spec(task=task, path=str(folder))))
        here[specs[-1][0]] = small_model(specs[-1][1])
    specs.append(("bf16 llama", specs[0][1]))
    here["bf16 llama"] = here["llama"]
    context = mp.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        processes = [
            context.Process(target=run_rank, args=(rank, port, specs, results))
            for port in free_ports(1)
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
            assert process.exitcode == 0
        return here, dict(results)


@pytest.mark.parametrize(
    "key", [*ARCHITECTURES, "folder causal_lm", "folder sequence_classification"]
)
def test_zero_3_gives_the_same_model(
    built: tuple[dict[str, Any], dict[Any, Any]], key: str
) -> None:
    model, results = built[0][key], built[1]
    with torch.no_grad():
        loss = first_loss(model)
    mine = (
        digest(dict(model.named_parameters())),
        num_parameters(model),
        [len(group["params"]) for group in parameter_groups(model, 0.1)],
    )
    for rank in range(2):
        hexdigest, zero_loss, count, groups = results[key, rank]
        assert (hexdigest, count, groups) == mine
        assert zero_loss == pytest.approx(loss, abs=1e-5)
    if task_of(key) == "causal_lm":
        assert loss == pytest.approx(math.log(VOCAB), rel=0.03)


def test_half_precision_rounds_the_same_weights(
    built: tuple[dict[str, Any], dict[Any, Any]],
) -> None:
    rounded = {
        name: parameter.bfloat16() for name, parameter in built[0]["llama"].named_parameters()
    }
    assert built[1]["bf16 llama", 0][0] == built[1]["bf16 llama", 1][0] == digest(rounded)
