"""From the spec's model section to a configuration, and every refusal with its way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dray.errors import SpecError
from dray.models.build import check_builds
from dray.models.config import make_config
from dray.plan.architectures import default_intermediate_size
from small_models import VOCAB, small_model, small_spec, some_ids

DECODERS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gpt2",
    "gpt_neox",
    "opt",
    "bert",
    "roberta",
    "gemma2",
    "phi3",
    "bloom",
    "falcon",
    "olmo2",
    "modernbert-decoder",
)
CLASSIFIERS = (
    "llama",
    "gpt2",
    "bert",
    "roberta",
    "modernbert",
    "distilbert",
    "electra",
    "deberta-v2",
    "albert",
)


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_decoder_sees_no_later_token(architecture: str) -> None:
    model, ids = small_model(small_spec(architecture)), some_ids()
    other = ids.clone()
    other[:, 20:] = 5
    with torch.no_grad():
        assert torch.equal(
            model(input_ids=ids).logits[:, :20], model(input_ids=other).logits[:, :20]
        )
    assert model.config.use_cache is False
    assert model.config.eos_token_id == 0


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_padding_does_not_change_a_classification(architecture: str) -> None:
    model, ids = small_model(small_spec(architecture, "sequence_classification")), some_ids()
    mask = torch.ones_like(ids)
    mask[1, 20:], ids[1, 20:] = 0, 1
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits
        alone = model(input_ids=ids[1:2, :20], attention_mask=mask[1:2, :20]).logits
    assert together.shape == (4, 3)
    torch.testing.assert_close(together[1], alone[0], atol=1e-5, rtol=0)


def config_of(spec: Any, **arguments: Any) -> Any:
    return make_config(
        spec, **({"vocab_size": VOCAB, "pad_token_id": 1, "eos_token_id": 0} | arguments)
    )


@pytest.mark.parametrize(
    ("architecture", "width"),
    [
        ("llama", 170),
        ("mistral", 170),
        ("gemma2", 170),
        ("gpt2", 256),
        ("gpt_neox", 256),
        ("opt", 256),
    ],
)
def test_feed_forward_width_follows_the_gate(architecture: str, width: int) -> None:
    model = small_model(small_spec(architecture))
    gated = any("gate_proj" in name for name, _ in model.named_modules())
    assert gated == (width == 170)
    widths = {
        max(p.shape) for name, p in model.named_parameters() if ".mlp." in name or "fc1" in name
    }
    assert width in widths
    assert small_spec(architecture, intermediate_size=96).model.intermediate_size == 96


def test_feed_forward_width_is_the_widely_used_one() -> None:
    assert default_intermediate_size("llama", 384) == 1024
    assert default_intermediate_size("gpt2", 768) == 3072


def test_dropout_reaches_every_field_and_options_win() -> None:
    config = config_of(
        small_spec(
            "gpt2", sections={"regularization": {"dropout": 0.25}}, options={"attn_pdrop": 0.0}
        )
    )
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.25, 0.25, 0.0)
    opt = config_of(small_spec("opt", sections={"regularization": {"dropout": 0.25}}))
    assert (opt.dropout, opt.layerdrop) == (0.25, 0.0)


def test_sizes_and_positions() -> None:
    config = config_of(small_spec("llama", num_kv_heads=2, max_positions=128, tie_embeddings=False))
    assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings) == (
        2,
        16,
        128,
    )
    assert not config.tie_word_embeddings
    assert config_of(small_spec("gpt2")).n_positions == 32
    assert config_of(small_spec("roberta"), pad_token_id=5).max_position_embeddings == 32 + 6
    assert config_of(small_spec("llama", vocab_size=640)).vocab_size == 640


def test_a_decoder_beside_an_encoder_has_the_sizes_that_were_asked_for() -> None:
    config = config_of(small_spec("bart"))
    assert (config.decoder_layers, config.decoder_attention_heads) == (2, 4)
    assert config.decoder_ffn_dim == config.encoder_ffn_dim == 256


def test_the_experts_of_a_mixture_have_a_width_that_their_products_can_be_grouped_by() -> None:
    assert config_of(small_spec("mixtral")).intermediate_size == 176
    assert config_of(small_spec("mixtral", intermediate_size=96)).intermediate_size == 96


@pytest.mark.parametrize(
    ("architecture", "task", "words"),
    [
        ("gemma3", "causal_lm", "gemma3: keeps its sizes in text_config; .*; give gemma3_text"),
        ("perceiver", "masked_lm", "perceiver: keeps its sizes in fields of its own"),
        ("funnel", "masked_lm", "funnel: takes no number of blocks"),
    ],
)
def test_what_would_be_built_at_a_size_of_its_own_is_refused(
    architecture: str, task: str, words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        config_of(small_spec(architecture, task))


def test_the_end_of_text_is_trained_even_if_it_is_also_padding() -> None:
    assert config_of(small_spec("llama"), pad_token_id=0).pad_token_id is None
    assert (
        config_of(small_spec("llama", "sequence_classification"), pad_token_id=0).pad_token_id == 0
    )


@pytest.mark.parametrize("architecture", ["roberta", "bert", "llama"])
def test_packed_rows_need_no_padding_token(architecture: str, tmp_path: Path) -> None:
    model = small_model(small_spec(architecture), pad_token_id=None, eos_token_id=5)
    assert model.config.pad_token_id == (5 if architecture == "roberta" else None)
    ids = some_ids()
    ids[:, 0] = 0  # an ordinary token, and trained as such
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad[0].abs().sum() > 0
    model.save_pretrained(tmp_path / "m")
    again = small_model(small_spec(path=str(tmp_path / "m")), pad_token_id=None, eos_token_id=7)
    assert again.config.pad_token_id == model.config.pad_token_id
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_labels_name_the_classes() -> None:
    config = config_of(
        small_spec("bert", "sequence_classification"), num_labels=2, labels=("bad", "good")
    )
    assert (config.id2label, config.num_labels) == ({0: "bad", 1: "good"}, 2)
    assert config.architectures == ["BertForSequenceClassification"]


@pytest.mark.parametrize(
    ("architecture", "model", "words"),
    [
        ("lama", {}, "did you mean llama"),
        ("vit", {}, "no causal_lm model"),
        ("distilbert", {}, "no causal_lm model"),
        ("llama", {"vocab_size": 300}, "the tokeniser has 512 tokens"),
        ("llama", {"max_positions": 16}, "data.sequence_tokens is 32"),
        ("gpt2", {"num_kv_heads": 2}, "no grouped heads"),
        ("bloom", {"intermediate_size": 64}, "has a fixed one"),
        ("llama", {"options": {"rms_norm_epss": 1e-5}}, "did you mean rms_norm_eps"),
        (
            "llama",
            {"options": {"rms_norm_eps": "small"}},
            "refuses these settings .*rms_norm_eps.*float",
        ),
        ("llama", {"options": {"hidden_size": 128}}, "give model.hidden_size"),
        ("gpt2", {"options": {"n_embd": 128}}, "give model.hidden_size"),
        ("gpt2", {"options": {"n_inner": 128}}, "give model.intermediate_size"),
        (
            "gpt2",
            {"options": {"bos_token_id": 3}},
            "follows from the task, the tokeniser or the precision",
        ),
    ],
)
def test_refusals(architecture: str, model: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        config_of(small_spec(architecture, **model))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with a tokeniser of its own."""
    path = tmp_path_factory.mktemp("config") / "llama"
    small_model(small_spec("llama")).save_pretrained(path)
    save_tokenizer(path, {f"word{index}": index for index in range(VOCAB)})
    return path


def save_tokenizer(path: Path, vocabulary: dict[str, int]) -> None:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "WordLevel", "vocab": vocabulary}})
    )


def test_a_folder_gives_its_sizes_and_the_spec_its_dropout(folder: Path) -> None:
    spec = small_spec(
        path=str(folder),
        sections={"regularization": {"dropout": 0.1}},
        options={"rms_norm_eps": 1e-3},
    )
    config = config_of(spec)
    assert (config.hidden_size, config.attention_dropout, config.rms_norm_eps) == (64, 0.1, 1e-3)


@pytest.mark.parametrize(
    ("model", "sections", "words"),
    [
        ({"hidden_size": 128}, {}, "has 64; weights decide"),
        ({}, {"tokenizer": {"train": "byte_bpe"}}, "was trained with another tokeniser"),
        ({}, {"data": {"train": "x", "sequence_tokens": 64}}, "takes rows of 32 tokens"),
        ({"options": {"nonsense": 1}}, {}, "no field of LlamaConfig"),
        ({"options": {"hidden_size": 128}}, {}, "give model.hidden_size"),
        ({"max_positions": 64}, {}, "has 32; weights decide"),
    ],
)
def test_refusals_of_a_folder(folder: Path, model: Any, sections: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        config_of(small_spec(path=str(folder), sections=sections, **model))


def test_another_tokeniser_is_refused_even_at_the_same_size(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, {f"other{index}": index for index in range(VOCAB)})
    with pytest.raises(SpecError, match=r"tokenizer\.path.*is not the tokeniser of"):
        config_of(small_spec(path=str(folder), sections={"tokenizer": {"path": str(tmp_path)}}))


def test_a_vocabulary_of_another_size_is_refused_unless_it_is_padding(folder: Path) -> None:
    with pytest.raises(SpecError, match="has 512 tokens, the tokeniser 600"):
        config_of(small_spec(path=str(folder)), vocab_size=600)
    assert (
        config_of(small_spec(path=str(folder)), vocab_size=500).vocab_size == 512
    )  # its own tokeniser: padded rows


def test_folders_that_are_none(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(SpecError, match="no such folder"):
        config_of(small_spec(path=str(tmp_path / "missing")))
    with pytest.raises(SpecError, match="never pickles"):
        config_of(small_spec(path=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(SpecError, match=r"config\.json cannot be used"):
        config_of(small_spec(path=str(tmp_path)))
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(SpecError, match="quantised"):
        config_of(small_spec(path=str(tmp_path)))
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"w": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SpecError, match="not in the folder"):
        config_of(small_spec(path=str(tmp_path)))


def test_a_value_that_the_configuration_takes_and_the_model_does_not_is_refused() -> None:
    check_builds(spec := small_spec("llama", options={"hidden_act": "silu"}), config_of(spec))
    spec = small_spec("llama", options={"hidden_act": "gelly"})
    with pytest.raises(SpecError, match=r"llama cannot be built \(KeyError: .*gelly"):
        check_builds(spec, config_of(spec))
