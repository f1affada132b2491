"""Ways to the loss of a language model's head, timed side by side: `bench/gpu/run.sh --losses`.

Milliseconds of forward and backward, and the peak beside the inputs, for the heads of GPT-2 124M
and a Llama of 1B parameters in bf16: Liger's fused loss, where it is installed, also with the
vocabulary widened; dray's chunks of several sizes; whole logits, compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.checks import milliseconds
from dray.tasks.parts import losses

HEADS = {"gpt2-124m": (32_768, 768, 50_257), "llama-1b": (16_384, 2048, 32_000)}
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def ways() -> dict[str, tuple[int, Way]]:
    """By name: bytes of a chunk, and the loss."""

    def dray(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return losses.linear_cross_entropy(hidden, weight, None, labels)

    def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    found: dict[str, tuple[int, Way]] = {
        f"chunks of {size} MB": (size * 10**6, dray) for size in (256, 512, 1024, 2048)
    }
    found["chunks of 1024 MB, compiled as a whole"] = (1024 * 10**6, torch.compile(dray))
    found["whole logits, compiled"] = (0, torch.compile(whole))
    with suppress(ImportError):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)

        def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return fused(weight, hidden, labels)

        def liger_widened(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            # Not the same loss (the zeros count), but the same work.
            return fused(losses._widened(weight, None)[0], hidden, labels)

        found |= {"Liger": (0, liger), "Liger, widened": (0, liger_widened)}
    return found


def main() -> None:
    device = torch.device("cuda")
    for name, (rows, width, classes) in HEADS.items():
        hidden = torch.randn(rows, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(classes, width, device=device, dtype=torch.bfloat16) / width**0.5
        weight.requires_grad_()
        labels = torch.randint(0, classes, (rows,), device=device)
        floor = 6 * rows * width * classes / 0.8e15 * 1e3
        print(f"{name}: {floor:.1f} ms at 800 TFLOP/s")
        for way, (size, loss) in ways().items():
            losses.loss_chunk_bytes = lambda _, size=size: size  # type: ignore[misc]
            torch.compiler.reset()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()

            def once(loss: Way = loss) -> None:
                hidden.grad = weight.grad = None  # noqa: B023 - called within the turn
                loss(hidden, weight, labels).backward()  # noqa: B023

            try:
                spent = milliseconds(once, 5)
            except Exception as error:  # an arm that cannot run must not take the others with it
                print(f"  {way}: {type(error).__name__}: {str(error)[:200]}")
                continue
            peak = torch.cuda.max_memory_allocated() - before
            print(f"  {way}: {spent:.1f} ms, {peak / 2**20:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
