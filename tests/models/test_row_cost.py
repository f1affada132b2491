"""What a row costs a model of no tokens, measured without memory, and what a plan makes of it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dray.errors import PlanError, SpecError
from dray.models.build import build_model
from dray.models.counting import count_model, find_counts, make_counted_plan
from dray.models.row_cost import measure_row
from dray.plan import Counted, Plan, format_plan, make_plan, parse_shape
from dray.spec import Spec, make_spec

RESNET = {
    "architecture": "resnet",
    "options": {
        "layer_type": "basic",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 2],
    },
}
VIT = {
    "architecture": "vit",
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "options": {"patch_size": 4},
}
CONFORMER = {
    "architecture": "wav2vec2-bert",
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "options": {"position_embeddings_type": "rotary"},
}


def image_spec(model: dict[str, Any], **sections: Any) -> Spec:
    tree: dict[str, Any] = {
        "name": "images",
        "task": {"name": "image_classification", "size": 32, "channels": 1},
        "data": {"train": {"path": "none", "format": "files"}},
        "model": model,
        "batch": {"global_rows": 24},
        "duration": {"steps": 4},
        "precision": "fp32",
    }
    return make_spec(tree | sections)


def sound_spec(model: dict[str, Any], **settings: Any) -> Spec:
    return image_spec(
        model,
        task={"name": "speech_recognition", **settings},
        data={"train": {"path": "none", "columns": {"audio": "a"}}, "sequence_tokens": 100},
    )


def count(spec: Spec) -> Counted:
    return count_model(spec, vocab_size=0, num_labels=5)


@pytest.mark.parametrize("model", [RESNET, VIT], ids=["resnet", "vit"])
def test_the_sizes_are_those_of_the_model_that_is_built(model: dict[str, Any]) -> None:
    spec = image_spec(model)
    built = build_model(spec, vocab_size=0, num_labels=5)
    found = count(spec)
    assert found.count.total == sum(parameter.numel() for parameter in built.parameters())
    assert built.config.num_channels == 1
    assert built(pixel_values=torch.zeros(2, 1, 32, 32)).logits.shape == (2, 5)


def test_the_work_of_a_row_is_what_the_shapes_of_a_transformer_say() -> None:
    """Patches, blocks and head, counted by hand: 65 places of 64 places and a class token."""
    row = count(image_spec(VIT)).row
    assert row is not None
    places, hidden = 65, 64
    block = places * 12 * hidden**2 + 2 * places**2 * hidden
    forward = 2 * (64 * 16 * hidden + 3 * block + hidden * 5)
    assert row.flops == pytest.approx(3 * forward, rel=1e-6)
    assert (row.tokens, row.shares_statistics) == (1, False)


def test_what_is_kept_is_what_autograd_keeps_where_numbers_are() -> None:
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)]

    class Small(nn.Sequential):
        def forward(self, pixel_values: Any) -> Any:
            return {"logits": super().forward(pixel_values)}

    with torch.device("meta"):
        model = Small(
            *(
                type(layer)(*arguments)
                for layer, arguments in zip(layers, [(1, 4, 3), (), (), (4 * 36, 3)], strict=True)
            )
        )
    row = measure_row(model, {"pixel_values": torch.zeros(2, 1, 8, 8)}, 1)
    # The input, what the ReLU gives (the flat copy is a view of it), and the logits.
    assert (row.elements, row.largest) == (64 + 144 + 3, 144)
    assert row.flops == 3 * 2 * (36 * 9 * 4 + 144 * 3)


def plan(spec: Spec, **given: Any) -> Plan:
    shape = parse_shape("1xCPU(cpus=8,memory=16GB)")
    return make_plan(spec, shape, counted=count(spec), **given)


def test_a_plan_of_rows_that_are_no_texts_is_of_what_was_measured() -> None:
    spec = image_spec(VIT)
    made = plan(spec, num_rows=1000, num_tokens=1000)
    row = made.counted.row if made.counted else None
    assert row is not None
    assert (made.tokens_per_step, made.row_tokens, made.flops_per_token_strict) == (
        24,
        1,
        row.flops,
    )
    assert made.memory.activations_kept == made.batch.micro_rows * row.elements * 4
    told = format_plan(made)
    assert "FLOPs a row" in told
    assert "FLOPs a token" not in told
    wider = image_spec({**VIT, "hidden_size": 128})
    assert plan(wider).memory.total > made.memory.total
    slow, fast = (plan(one, num_rows=1000).step_seconds or math.inf for one in (wider, spec))
    assert slow > 2 * fast


def test_longer_sounds_cost_more() -> None:
    made = [
        plan(sound_spec(CONFORMER), num_rows=100, num_tokens=100 * tokens) for tokens in (20, 80)
    ]
    short, long = (one.step_seconds or math.inf for one in made)
    assert long > 2 * short
    assert made[0].memory.activations == made[1].memory.activations  # of the longest that may come


def test_rows_that_look_at_each_other_are_computed_at_once() -> None:
    spec = image_spec(RESNET, resources={"workers": 2})
    assert plan(spec).batch.micro_rows == 12
    with pytest.raises(PlanError, match=r"resnet normalises batches.*batch.micro_rows=auto"):
        plan(
            image_spec(RESNET, resources={"workers": 2}, batch={"global_rows": 24, "micro_rows": 6})
        )
    with pytest.raises(PlanError, match="resnet normalises batches"):
        plan(image_spec(RESNET, resources={"workers": [5, 5]}))  # which do not divide it
    free = image_spec(VIT, resources={"workers": 2}, batch={"global_rows": 24, "micro_rows": 6})
    assert plan(free).batch.accumulation == 2


def test_batches_of_padded_rows_are_not_normalised() -> None:
    model = {**CONFORMER, "architecture": "wav2vec2-conformer", "options": {}}
    with pytest.raises(PlanError, match="padding would count as a part of them"):
        plan(sound_spec(model, features="samples"))


def test_rows_that_belong_together_stay_so() -> None:
    mixed = {"name": "image_classification", "size": 32, "channels": 1, "mixup": 0.2}
    spec = image_spec(VIT, task=mixed, resources={"workers": 4})
    assert plan(spec).batch.micro_rows == 6
    odd = {"global_rows": 12, "micro_rows": 3}
    with pytest.raises(PlanError, match="computes 2 rows of a step together"):
        plan(image_spec(VIT, task=mixed, resources={"workers": 4}, batch=odd))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            sound_spec({**CONFORMER, "architecture": "wav2vec2", "options": {}}),
            "wav2vec2 takes input_values",
        ),
        (sound_spec({**VIT, "options": {}}), "vit has no speech_recognition model"),
        (image_spec({**RESNET, "hidden_size": 64}), "resnet has no such size"),
        (
            image_spec({**VIT, "options": {"image_size": 64}}),
            "model.options.image_size: follows from the task",
        ),
        (image_spec({"architecture": "vitt"}), "did you mean"),
    ],
)
def test_models_that_do_not_go_with_a_task_are_refused(spec: Spec, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        count(spec)


def test_a_plan_measures_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = (
        "import sys, json\n"
        "from dray.models.counting import find_counts\n"
        "from dray.spec import make_spec\n"
        "found = find_counts(make_spec(json.loads(sys.argv[1])))\n"
        "assert 'torch' not in sys.modules\n"
        "print(found.row.flops)\n"
    )
    spec = image_spec(VIT)
    tree = spec.model_dump_json()
    told = [
        subprocess.run(
            [sys.executable, "-c", code, tree],
            capture_output=True,
            text=True,
            check=True,
            env=dict(os.environ),
        ).stdout
        for _ in range(2)  # the second time it is remembered
    ]
    found = find_counts(spec)
    assert isinstance(found, Counted)
    assert found.row is not None
    assert [float(text) for text in told] == [found.row.flops] * 2
    made = make_counted_plan(spec, parse_shape("1xCPU(cpus=8,memory=16GB)"))
    assert made.counted == found
    with pytest.raises(SpecError, match="what a model takes that reads no text is measured"):
        make_plan(spec, parse_shape("1xCPU(cpus=8,memory=16GB)"))


def test_what_is_computed_of_others_is_drawn_by_the_seed() -> None:
    """Wav2Vec2's positions are a convolution whose weight is a direction and a norm."""
    spec = sound_spec(
        {
            "architecture": "wav2vec2",
            "hidden_size": 32,
            "num_layers": 1,
            "num_heads": 4,
            "options": {"num_conv_pos_embedding_groups": 4},
        },
        features="samples",
    )
    models = [build_model(spec, vocab_size=0) for _ in range(2)]
    weights = [model.wav2vec2.encoder.pos_conv_embed.conv.weight for model in models]
    assert torch.equal(*weights)
    bound = 1 / math.sqrt(weights[0][0].numel())  # of torch's own layers
    assert 0.9 * bound < float(weights[0].detach().abs().max()) <= bound * 1.001
