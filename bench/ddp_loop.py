"""The hand-written arm: PyTorch DDP on tensors that are already in memory, the least that training
can cost.

Run by `torchrun --nproc-per-node 2 bench/ddp_loop.py …`; prints one JSON line on rank 0. It shares
nothing with dray.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in {
        "steps": 12,
        "micro": 8,
        "seq": 512,
        "hidden": 384,
        "layers": 6,
        "vocab": 8192,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=arguments.hidden,
            intermediate_size=arguments.hidden * 8 // 3,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden // 64,
            num_key_value_heads=arguments.hidden // 64,
            vocab_size=arguments.vocab,
            max_position_embeddings=arguments.seq,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    wrapped = DistributedDataParallel(model)
    run = torch.compile(wrapped) if arguments.compile else wrapped
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    rows = torch.randint(0, arguments.vocab, (arguments.steps, arguments.micro, arguments.seq))
    seconds = []
    for step in range(arguments.steps):
        begun = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if arguments.bf16 else nullcontext():
            loss = run(input_ids=rows[step], labels=rows[step]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
    if dist.get_rank() == 0:
        body = sorted(seconds[3:])
        tokens = dist.get_world_size() * arguments.micro * arguments.seq
        print(
            json.dumps(
                {
                    "tokens_per_second": tokens / body[len(body) // 2],
                    "first_step_seconds": seconds[0],
                }
            )
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
