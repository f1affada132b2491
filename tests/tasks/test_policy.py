"""Learning from rewards: answers are written, judged and learnt from, the same ones for any number
of workers and after any end."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dray.corpus.prepare import prepare
from dray.errors import SpecError
from dray.release.evaluate import evaluate
from dray.release.generate import generate
from dray.spec import Spec, make_spec
from dray.tasks.parts.rollouts import advantages, joined_answers, write_answers
from dray.train import train_locally
from pairs import write
from tiny import tiny_tree

pytestmark = pytest.mark.usefixtures("local_ray")
DIGITS = 10


def babble(folder: Path, num: int = 400) -> Path:
    """Texts of the form of an answer, with any digit at all in its place."""
    drawn = random.Random(0)
    folder.mkdir()
    lines = [
        {"text": f"copy {drawn.randrange(DIGITS)} : {drawn.randrange(DIGITS)}"} for _ in range(num)
    ]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


def prompts(num: int = 60) -> list[dict[str, str]]:
    return [
        {"prompt": f"copy {place % DIGITS} :", "answer": f" {place % DIGITS}"}
        for place in range(num)
    ]


def tree_of(folder: Path, **sections: Any) -> dict[str, Any]:
    tree = {
        "data": {
            "train": {"path": f"{folder}/*.jsonl"},
            "validation": {"path": f"{folder}/*.jsonl"},
            "sequence_tokens": 16,
            "cleaning": {"deduplicate": "none"},
        },
        "tokenizer": {"train": "byte_bpe", "vocab_size": 290},
        "model": {"architecture": "llama", "hidden_size": 32, "num_layers": 2, "num_heads": 2},
        "batch": {"global_rows": 16, "micro_rows": 8},
        "optimizer": {"learning_rate": 3e-3},
        "resources": {"workers": 1},
        "checkpoint": {"every_steps": 50},
    }
    made = tiny_tree(folder, **{**tree, **sections})
    if "run" in made["model"]:
        made["model"] = {"run": made["model"]["run"]}
        made["tokenizer"] = {"run": made["model"]["run"]}
    return made


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """A storage with `babbler`, a model that answers in form, with any digit."""
    folder = tmp_path_factory.mktemp("policy")
    texts = babble(folder / "texts")
    write(folder / "prompts", prompts())  # type: ignore[arg-type]
    spec = make_spec(
        tree_of(
            texts,
            name="babbler",
            task="causal_lm",
            data={"train": [f"{texts}/*.jsonl"], "sequence_tokens": 16, "validation": None},
            duration={"steps": 150},
            validation={"metric": "loss"},
        )
    )
    prepare(spec, str(folder / "runs"))
    train_locally(spec, storage=str(folder / "runs"))
    return folder / "runs"


def test_a_row_without_room_for_an_answer_is_refused_before_anything_is_read(
    tmp_path: Path,
) -> None:
    task = {"name": "policy", "max_tokens": 16}
    with pytest.raises(SpecError, match="sequence_tokens = 16: policy needs room for 16 tokens"):
        make_spec(tree_of(tmp_path, task=task), "spec")


def make(storage: Path, steps: int, task: dict[str, Any] | None = None, **sections: Any) -> Spec:
    settings = {"name": "policy", "answers": 8, "max_tokens": 3, **(task or {})}
    own = {
        "name": "policy",
        "model": {"run": "babbler"},
        "task": settings,
        "duration": {"steps": steps},
        "validation": {"every_steps": steps, "metric": "reward", "max_rows": 20},
    }
    return make_spec(tree_of(storage.parent / "prompts", **{**own, **sections}))


def test_what_is_rewarded_becomes_likelier_whatever_was_wanted(storage: Path) -> None:
    """An even digit is worth something: half of the answers at first."""
    spec = make(storage, 25, {"rewards": {"regex": 1.0}, "pattern": "[02468]"})
    prepare(spec, str(storage))
    run = train_locally(spec, storage=str(storage), run_name="even").run
    losses = [row["loss"] for row in run.metrics()]
    assert -0.75 < losses[0] < -0.25
    after = run.validations()[-1]
    assert after["reward"] > 0.9, (losses, after)
    assert after["loss"] == pytest.approx(-after["reward"])
    found = evaluate(str(storage), "even")
    assert found["reward"] > 0.9
    (text,) = generate(str(storage), "even", ["copy 3 :"], max_tokens=3, temperature=0)
    assert text.strip() in "02468"


@pytest.mark.slow
def test_a_toy_is_learnt_from_a_tenth_to_nine_tenths(storage: Path) -> None:
    """To copy a digit: one answer in ten is right at first."""
    spec = make(
        storage,
        400,
        {"answers": 24, "max_tokens": 2, "loss": "dr_grpo"},
        batch={"global_rows": 20, "micro_rows": 20},
        optimizer={"learning_rate": 2e-3},
    )
    prepare(spec, str(storage))
    run = train_locally(spec, storage=str(storage), run_name="copies").run
    rewards = [-row["loss"] for row in run.metrics()]
    assert sum(rewards[:3]) / 3 < 0.15
    after = run.validations()[-1]
    assert after["reward"] > 0.9, (rewards[::10], after)


def test_answers_are_drawn_from_the_model_and_joined_to_their_prompts() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=9,
            pad_token_id=10,
        )
    ).eval()
    prompts = torch.tensor([[10, 10, 3, 4], [5, 6, 7, 8]])
    mask = (prompts != 10).long()
    uniforms = torch.rand(2, 5, generator=torch.Generator().manual_seed(3))
    answers, sizes = write_answers(model, prompts, mask, uniforms, 0.7)
    alone, _ = write_answers(model, prompts[:1, 2:], mask[:1, 2:], uniforms[:1], 0.7)
    assert alone[0, : sizes[0]].tolist() == answers[0, : sizes[0]].tolist()
    for row in range(2):  # each token lies where its number does
        ids = prompts[row][mask[row] == 1]
        for place in range(int(sizes[row])):
            scores = model(input_ids=ids[None]).logits[0, -1]
            sums = torch.softmax(scores.double() / 0.7, dim=-1).cumsum(dim=-1)
            token = int((sums <= uniforms[row, place]).sum())
            assert token == answers[row, place]
            ids = torch.cat([ids, torch.tensor([token])])
    joined = joined_answers(prompts, mask, answers, sizes)
    for row, size in enumerate(sizes.tolist()):
        own = [*prompts[row][mask[row] == 1].tolist(), *answers[row, :size].tolist()]
        assert joined["input_ids"][row, : len(own)].tolist() == own
        assert int(joined["attention_mask"][row].sum()) == len(own)
        targets = joined["labels"][row]
        assert targets[targets >= 0].tolist() == answers[row, :size].tolist()


def test_advantages_compare_the_answers_to_one_prompt() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(
        advantages(rewards, scaled=False),
        torch.tensor([[0.5, -0.5, -0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]),
    )
    scaled = advantages(rewards, scaled=True)
    assert float(scaled[0, 0]) == pytest.approx(0.5 / (float(rewards[0].std()) + 1e-4))
    assert not scaled[1].any()
