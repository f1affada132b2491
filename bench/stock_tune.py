"""The stock arm of the sweeps: Ray Tune with a TorchTrainer a trial, as Ray's own guide writes it.

`python -m bench.stock_tune TRIALS WORKERS STEPS LOG`: each trial trains a small Llama for some
steps and writes a JSON line for each step, with its time, into LOG.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

MODEL = {
    "hidden_size": 64,
    "intermediate_size": 171,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 128,
}


def train_loop(config: dict[str, Any]) -> None:
    import ray.train
    import torch
    from ray.train.torch import prepare_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    model = prepare_model(LlamaForCausalLM(LlamaConfig(**MODEL)))
    stepping = torch.optim.AdamW(model.parameters(), lr=config["learning_rate"])
    rows = torch.randint(0, MODEL["vocab_size"], (8, 128))
    for step in range(1, config["steps"] + 1):
        loss = model(input_ids=rows, labels=rows).loss
        stepping.zero_grad()
        loss.backward()
        stepping.step()
        if ray.train.get_context().get_world_rank() == 0:
            with open(config["log"], "a") as log:
                line = {"trial": config["trial"], "step": step, "time": time.time()}
                log.write(json.dumps(line) + "\n")
    ray.train.report({"loss": float(loss.detach())})


def run_trial(config: dict[str, Any]) -> None:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    trainer = TorchTrainer(
        train_loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=config["workers"]),
        run_config=RunConfig(
            name=f"trial-{config['trial']}",
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
        ),
    )
    trainer.fit()


def main() -> None:
    import ray
    from ray import tune

    trials, workers, steps, log = (*map(int, sys.argv[1:4]), sys.argv[4])
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    with tempfile.TemporaryDirectory() as storage:
        ray.init("local", num_cpus=workers + 1, log_to_driver=False, include_dashboard=False)
        tuner = tune.Tuner(
            tune.with_resources(run_trial, {"CPU": 0.01}),
            param_space={
                "trial": tune.grid_search(list(range(trials))),
                "learning_rate": 1e-3,
                "workers": workers,
                "steps": steps,
                "log": log,
                "storage": storage,
            },
            tune_config=tune.TuneConfig(max_concurrent_trials=1),
            run_config=tune.RunConfig(storage_path=storage, verbose=0),
        )
        tuner.fit()
        ray.shutdown()


if __name__ == "__main__":
    main()
