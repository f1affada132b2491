"""Parameter counts and kept activations against real transformers models; sizes from folders;
FLOPs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from dray.errors import SpecError
from dray.models.build import compile_model, one_document_a_row
from dray.plan.activations import layer_bytes_per_token
from dray.plan.architectures import is_gated
from dray.plan.flops import flops_per_token_loose, flops_per_token_strict
from dray.plan.parameters import ROTARY_GATED, Dimensions, count_parameters, load_dimensions
from dray.spec import Spec, make_spec
from tiny import source_for

CAUSAL = (*ROTARY_GATED, "gpt2", "gpt_neox")
COUNTED = (*CAUSAL, "gpt_bigcode", "starcoder2", "nemotron")
ENCODERS = ("bert", "roberta", "distilbert", "modernbert")


def spec_of(
    architecture: str,
    task: str = "causal_lm",
    *,
    layers: int = 2,
    dropout: float = 0.0,
    **model: Any,
) -> Spec:
    source = source_for(task)
    sizes = {"architecture": architecture, "hidden_size": 64, "num_layers": layers, "num_heads": 4}
    return make_spec(
        {
            "name": "t",
            "task": task,
            "data": {"train": source, "sequence_tokens": 96},
            "tokenizer": {"train": "byte_bpe", "vocab_size": 512},
            "model": sizes | model,
            "duration": {"steps": 1},
            "regularization": {"dropout": dropout},
        }
    )


def built(spec: Spec, device: str) -> Any:
    from dray.models.config import make_config

    config = make_config(spec, vocab_size=512, num_labels=3, pad_token_id=1, eos_token_id=0)
    auto = (
        AutoModelForCausalLM
        if spec.task.name == "causal_lm"
        else AutoModelForSequenceClassification
    )
    with torch.device(device):
        return auto.from_config(config)


def assert_counts(spec: Spec) -> None:
    model = built(spec, "meta")
    count = count_parameters(load_dimensions(spec, 512, 3))
    parameters = list(model.parameters())
    assert count.total == sum(p.numel() for p in parameters)
    assert count.largest == max(p.numel() for p in parameters)
    tables = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)]
    assert count.embedding == sum(table.weight.numel() for table in tables)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", COUNTED)
def test_language_models_are_counted_exactly(architecture: str, tied: bool) -> None:
    assert_counts(spec_of(architecture, tie_embeddings=tied))


@pytest.mark.parametrize("architecture", [*ROTARY_GATED, "starcoder2", "nemotron"])
def test_grouped_heads_and_widths_are_counted_exactly(architecture: str) -> None:
    assert_counts(spec_of(architecture, num_kv_heads=2, intermediate_size=200))


@pytest.mark.parametrize(
    "options", [{"attention_bias": True}, {"mlp_bias": True}, {"head_dim": 32}]
)
def test_options_that_change_a_llama_are_counted_exactly(options: dict[str, Any]) -> None:
    assert_counts(spec_of("llama", options=options))


@pytest.mark.parametrize("architecture", ENCODERS)
def test_classifiers_are_counted_exactly(architecture: str) -> None:
    assert_counts(spec_of(architecture, "sequence_classification"))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_decoders_that_classify_are_counted_exactly(architecture: str) -> None:
    assert_counts(spec_of(architecture, "sequence_classification"))


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_encoders_that_generate_are_counted_exactly(architecture: str) -> None:
    assert_counts(spec_of(architecture))


@pytest.mark.parametrize("pad_token_id", [None, 0, 1, 5])
def test_positions_that_begin_after_the_padding_id_are_counted_exactly(
    pad_token_id: int | None,
) -> None:
    from dray.models.config import make_config

    spec = spec_of("roberta", "sequence_classification")
    tokenizer = spec.tokenizer.model_copy(update={"train": None, "path": "elsewhere"})
    spec = spec.model_copy(update={"tokenizer": tokenizer})
    config = make_config(
        spec, vocab_size=512, num_labels=3, pad_token_id=pad_token_id, eos_token_id=0
    )
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    sizes = load_dimensions(spec, 512, 3, pad_token_id=pad_token_id)
    assert sizes.exact
    assert count_parameters(sizes).total == sum(p.numel() for p in model.parameters())
    assert not load_dimensions(spec).exact  # before the tokeniser is read


def test_plan_and_model_take_the_same_width_for_every_architecture() -> None:
    """By transformers' own activations: SiLU and its kin mean a gate, so do Gemma's and
    ModernBERT's GELU."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    from dray.models.config import INTERMEDIATE_NAMES

    wrong, names = (
        [],
        {
            *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            *modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        },
    )
    for name in sorted(names):
        try:
            config = CONFIG_MAPPING[name]()
        except Exception:  # some cannot be made without arguments
            continue
        if any(hasattr(config, field) for field in INTERMEDIATE_NAMES):
            gated = (
                getattr(config, "hidden_act", "") in ("silu", "swish", "swiglu")
                and "mamba" not in name
            )
            gated |= name.startswith(("gemma", "modernbert", "t5gemma", "vaultgemma"))
            if is_gated(name) != gated:
                wrong.append(name)
    assert not wrong


def test_vision_transformers_are_counted_exactly() -> None:
    with torch.device("meta"):
        model = ViTForImageClassification(
            ViTConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=256,
                image_size=64,
                patch_size=8,
                num_labels=3,
            )
        )
    spec = spec_of("vit", "sequence_classification", options={"image_size": 64, "patch_size": 8})
    assert count_parameters(load_dimensions(spec, 512, 3)).total == sum(
        p.numel() for p in model.parameters()
    )


def test_an_unknown_architecture_is_estimated_and_says_so() -> None:
    sizes = load_dimensions(spec_of("olmo"), 512)
    assert not sizes.exact
    real = sum(p.numel() for p in built(spec_of("olmo"), "meta").parameters())
    assert count_parameters(sizes).total == pytest.approx(real, rel=0.1)


def test_sizes_come_from_a_folder(tmp_path: Path) -> None:
    for architecture in ("llama", "gpt2", "bert", "distilbert"):
        task = "causal_lm" if architecture in CAUSAL else "sequence_classification"
        model = built(spec_of(architecture, task), "meta")
        model.config.save_pretrained(tmp_path / architecture)
        spec = make_spec(
            {
                "name": "t",
                "task": task,
                "data": {"train": source_for(task), "sequence_tokens": 96},
                "tokenizer": {"path": str(tmp_path)},
                "model": {"path": str(tmp_path / architecture)},
                "duration": {"steps": 1},
            }
        )
        assert count_parameters(load_dimensions(spec, 512, 3)).total == sum(
            p.numel() for p in model.parameters()
        )
        with pytest.raises(SpecError, match="512 tokens, the tokeniser 600"):
            load_dimensions(spec, 600)


def test_a_model_on_a_hub_is_planned_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    spec = make_spec(
        {
            "name": "t",
            "data": {"train": "none", "sequence_tokens": 96},
            "tokenizer": {"path": "x"},
            "model": {"path": "hf://owner/name"},
            "duration": {"steps": 1},
        }
    )
    with pytest.raises(SpecError, match="planning downloads nothing; hf download owner/name"):
        load_dimensions(spec)
    # As the hub's client lays its cache out: a name of a revision holds a commit, and a commit is a
    # folder.
    cached = tmp_path / "models--owner--name"
    model, other = built(spec_of("llama"), "meta"), built(spec_of("gpt2"), "meta")
    model.config.save_pretrained(cached / "snapshots" / "abc")
    other.config.save_pretrained(cached / "snapshots" / "def")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc", encoding="utf-8")
    assert count_parameters(load_dimensions(spec)).total == sum(
        p.numel() for p in model.parameters()
    )
    pinned = spec.model_copy(
        update={"model": spec.model.model_copy(update={"path": "hf://owner/name@def"})}
    )
    assert count_parameters(load_dimensions(pinned)).total == sum(
        p.numel() for p in other.parameters()
    )


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "llama"}', "[]"])
def test_unusable_folders_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    spec = make_spec(
        {
            "name": "t",
            "data": {"train": "none"},
            "tokenizer": {"path": "x"},
            "model": {"path": str(tmp_path)},
            "duration": {"steps": 1},
        }
    )
    with pytest.raises(SpecError, match=r"model\.path"):
        load_dimensions(spec)


def test_a_vocabulary_smaller_than_the_tokenisers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"model\.vocab_size = 300: the tokeniser has 512 tokens"):
        load_dimensions(spec_of("llama", vocab_size=300))
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 999}]}),
        encoding="utf-8",
    )
    spec = spec_of("llama", vocab_size=800)
    tokenizer = spec.tokenizer.model_copy(update={"train": None, "path": str(tmp_path)})
    spec = spec.model_copy(update={"tokenizer": tokenizer})
    with pytest.raises(SpecError, match="the tokeniser has 1000 tokens"):
        load_dimensions(spec)
    assert (
        load_dimensions(spec_of("llama", vocab_size=600)).vocab == 600
    )  # more rows than tokens are padding


def test_positions_must_hold_a_row() -> None:
    with pytest.raises(SpecError, match=r"model\.max_positions = 64"):
        load_dimensions(spec_of("llama", max_positions=64))


def kept_bytes_per_token(spec: Spec, dtype: torch.dtype, *, compiled: bool = False) -> float:
    """What autograd really saves in the forward pass, parameters left out, each storage once."""
    model = built(spec, "cpu").to(dtype).train()
    if compiled:  # cut as Inductor cuts it, without the minute that its code takes
        torch.compiler.reset()
        compile_model(model, "aot_eager_decomp_partition")
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    alive: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            sizes[place] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.randint(3, 512, (2, 96))
    inputs = {"input_ids": ids}
    if spec.task.name != "causal_lm":
        inputs["attention_mask"] = (torch.arange(96) < 80).long().expand(2, -1).contiguous()
    with one_document_a_row(), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        model(**inputs)
    return sum(sizes.values()) / ids.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [*CAUSAL, *ENCODERS])
def test_kept_activations_are_what_autograd_saves(architecture: str, dtype: torch.dtype) -> None:
    task = "causal_lm" if architecture in CAUSAL else "sequence_classification"
    width = 4 if dtype == torch.float32 else 2
    two, three = (
        kept_bytes_per_token(spec_of(architecture, task, layers=n), dtype) for n in (2, 3)
    )
    planned = layer_bytes_per_token(
        load_dimensions(spec_of(architecture, task), 512), width, 0.0, 96, on_gpu=False
    )
    assert planned == pytest.approx(three - two, rel=0.02)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "bert", "modernbert"])
def test_kept_activations_of_compiled_blocks_are_what_autograd_saves(architecture: str) -> None:
    task = "causal_lm" if architecture in CAUSAL else "sequence_classification"
    two, three = (
        kept_bytes_per_token(spec_of(architecture, task, layers=n), torch.bfloat16, compiled=True)
        for n in (2, 3)
    )
    sizes = load_dimensions(spec_of(architecture, task), 512)
    planned = layer_bytes_per_token(sizes, 2, 0.0, 96, on_gpu=False, compiled=True)
    assert planned == pytest.approx(three - two, rel=0.02)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", *ENCODERS])
def test_with_dropout_squares_of_scores_are_kept_on_a_cpu(architecture: str) -> None:
    task = "causal_lm" if architecture in CAUSAL else "sequence_classification"
    two, three = (
        kept_bytes_per_token(spec_of(architecture, task, layers=layers, dropout=0.1), torch.float32)
        for layers in (2, 3)
    )
    planned = layer_bytes_per_token(
        load_dimensions(spec_of(architecture, task), 512), 4, 0.1, 96, on_gpu=False
    )
    assert planned == pytest.approx(three - two, rel=0.03)


def test_flops_follow_the_formulas() -> None:
    sizes = load_dimensions(spec_of("llama"), 512)
    count, attention = count_parameters(sizes), 2 * 64 * 96
    assert flops_per_token_loose(sizes, count, 96) == 6 * count.total + 12 * attention
    # The tied head is multiplied, the table is not: N_nonembedding + head is just N.
    assert flops_per_token_strict(sizes, count, 96) == 6 * count.total + 6 * attention
    untied = load_dimensions(spec_of("llama", tie_embeddings=False), 512)
    strict = flops_per_token_strict(untied, count_parameters(untied), 96)
    assert strict == flops_per_token_strict(sizes, count, 96)
    assert flops_per_token_loose(untied, count_parameters(untied), 96) > flops_per_token_loose(
        sizes, count, 96
    )


def test_encoders_multiply_whole_squares() -> None:
    sizes = load_dimensions(spec_of("bert", "sequence_classification"), 512)
    count = count_parameters(sizes)
    assert flops_per_token_strict(sizes, count, 96) == 6 * count.body + 12 * 2 * 64 * 96
    assert isinstance(sizes, Dimensions)
