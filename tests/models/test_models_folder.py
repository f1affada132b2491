"""Reading weights from Hugging Face folders and writing such folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
)

from dray.errors import SpecError, StoreError
from dray.models.build import check_builds
from dray.models.config import make_config
from dray.models.folder import FolderWeights, save_pretrained_folder
from dray.models.source import check_weights
from dray.models.weights import check_fit, name_in, shapes_of
from small_models import VOCAB, digest, small_model, small_spec, some_ids


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "gemma2"])
def test_a_folder_written_by_transformers_is_read_back(tmp_path: Path, architecture: str) -> None:
    model = small_model(small_spec(architecture, sections={"seed": 3}))
    model.save_pretrained(tmp_path / "m", max_shard_size="100KB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    again = small_model(small_spec(path=str(tmp_path / "m")))
    assert digest(again.named_parameters()) == digest(model.named_parameters())
    assert again.load_report.not_taken == again.load_report.initialized == ()
    with torch.no_grad():
        assert torch.equal(again(input_ids=some_ids()).logits, model(input_ids=some_ids()).logits)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_language_model_starts_a_classifier(
    tmp_path: Path, architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    language_model = small_model(
        small_spec(architecture, tie_embeddings=False, sections={"seed": 3})
    )
    language_model.save_pretrained(tmp_path / "m")
    with caplog.at_level("INFO", "dray.models"):
        classifier = small_model(
            small_spec(path=str(tmp_path / "m"), task="sequence_classification")
        )
    assert digest(classifier.base_model.named_parameters()) == digest(
        language_model.base_model.named_parameters()
    )
    assert classifier.load_report.not_taken == ("lm_head.weight",)
    assert classifier.load_report.initialized == ("score.weight",)
    assert "1 left: lm_head.weight; 1 new: score.weight" in caplog.text
    assert 0.01 < float(classifier.score.weight.detach().std()) < 0.04
    again = small_model(small_spec(path=str(tmp_path / "m"), task="sequence_classification"))
    assert digest(classifier.named_parameters()) == digest(again.named_parameters())


def test_a_bare_backbone_and_another_number_of_labels(tmp_path: Path) -> None:
    config = small_model(small_spec("bert", "sequence_classification")).config
    BertModel(config).save_pretrained(tmp_path / "bare")
    bare = small_model(small_spec(path=str(tmp_path / "bare"), task="sequence_classification"))
    assert set(bare.load_report.initialized) == {"classifier.weight", "classifier.bias"}
    bare.save_pretrained(tmp_path / "three")
    two = small_model(
        small_spec(path=str(tmp_path / "three"), task="sequence_classification"), num_labels=2
    )
    assert set(two.load_report.initialized) == {"classifier.weight", "classifier.bias"}
    assert two.classifier.weight.shape == (2, 64)


def test_as_many_outputs_of_another_task_are_not_taken(tmp_path: Path) -> None:
    """Both heads are called `classifier`, and three tags are not three classes."""
    tags = {
        "data": {"train": [{"path": "unused", "format": "conll"}], "sequence_tokens": 32},
        "seed": 3,
    }
    tagger = small_model(small_spec("bert", "token_classification", sections=tags))
    tagger.save_pretrained(tmp_path / "m")
    whole = small_model(small_spec(path=str(tmp_path / "m"), task="sequence_classification"))
    assert {"classifier.weight", "classifier.bias"} <= set(whole.load_report.initialized)
    assert {"classifier.weight", "classifier.bias"} == set(whole.load_report.not_taken)
    same = small_model(small_spec(path=str(tmp_path / "m"), task="token_classification"))
    assert same.load_report.initialized == same.load_report.not_taken == ()


@pytest.mark.parametrize("labels", [("neg", "odd", "pos"), ("POS", "NEG", "ODD"), ("0", "1", "2")])
def test_a_head_for_the_same_classes_in_another_order_is_left(
    tmp_path: Path, labels: tuple[str, ...]
) -> None:
    task = "sequence_classification"
    small_model(small_spec("llama", task), labels=("pos", "neg", "odd")).save_pretrained(
        tmp_path / "m"
    )
    again = small_model(small_spec(path=str(tmp_path / "m"), task=task), labels=labels)
    assert again.config.id2label == dict(enumerate(labels))
    moved = labels == ("neg", "odd", "pos")
    assert (
        again.load_report.initialized
        == again.load_report.not_taken
        == (("score.weight",) if moved else ())
    )


def test_merged_weights_of_a_mixture(tmp_path: Path) -> None:
    model = small_model(
        small_spec("mixtral", intermediate_size=64, options={"num_local_experts": 2})
    )
    model.save_pretrained(tmp_path / "m")  # one tensor an expert there, one for all in the model
    again = small_model(small_spec(path=str(tmp_path / "m")))
    assert digest(again.named_parameters()) == digest(model.named_parameters())


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    small_model(small_spec("llama")).save_pretrained(tmp_path)
    spec, file = small_spec(path=str(tmp_path)), tmp_path / "model.safetensors"
    config = make_config(spec, vocab_size=VOCAB, pad_token_id=1, eos_token_id=0)
    bare = check_builds(spec, config)  # holds nothing: a driver looks at a folder with it
    check_fit(bare, FolderWeights(tmp_path))
    whole = load_file(file)
    kept = {
        name: tensor
        for name, tensor in whole.items()
        if name != "model.layers.1.mlp.up_proj.weight"
    }
    save_file(kept, file)
    with pytest.raises(
        SpecError, match=r"lacks 1 of .* such as model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        small_model(spec)
    with pytest.raises(
        SpecError, match=r"lacks 1 of .* such as model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        check_fit(bare, FolderWeights(tmp_path))
    save_file(kept | {"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)}, file)
    with pytest.raises(SpecError, match=r"has shape \[3, 3\], not \[170, 64\]"):
        small_model(spec)
    with pytest.raises(SpecError, match=r"has shape \[3, 3\], not \[170, 64\]"):
        check_fit(bare, FolderWeights(tmp_path))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SpecError, match="cannot be read"):
        small_model(spec)
    with pytest.raises(SpecError, match="cannot be read"):
        check_fit(bare, FolderWeights(tmp_path))


def save_small_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"word{index}": index for index in range(VOCAB)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0"))
    ).save_pretrained(folder)


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("llama", "causal_lm"),
        ("gpt2", "causal_lm"),
        ("bert", "sequence_classification"),
    ],
)
@pytest.mark.parametrize("max_shard_bytes", [50_000, 10**9])
def test_an_export_loads_with_transformers(
    tmp_path: Path, architecture: str, task: str, max_shard_bytes: int
) -> None:
    model = small_model(small_spec(architecture, task))
    save_small_tokenizer(tmp_path / "tokenizer")
    whole = max_shard_bytes == 10**9
    state = model.state_dict() if whole else (item for item in model.named_parameters())
    files = save_pretrained_folder(
        state, model.config, tmp_path / "tokenizer", tmp_path / "out", max_shard_bytes
    )
    assert (len(files) == 1) == whole
    assert {file.stat().st_mode for file in files} == {
        (tmp_path / "out" / "config.json").stat().st_mode
    }
    loader = AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification
    loaded, report = loader.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(
            loaded.eval()(input_ids=some_ids()).logits, model(input_ids=some_ids()).logits
        )
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == VOCAB
    assert loaded.config.use_cache in (True, None)
    again = small_model(small_spec(path=str(tmp_path / "out"), task=task))
    assert digest(again.named_parameters()) == digest(model.named_parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tokenizer"]


def test_an_export_overwrites_nothing_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    model = small_model(small_spec("llama"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(StoreError, match="exists already"):
        save_pretrained_folder(dict(model.named_parameters()), model.config, None, tmp_path / "out")

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(model.named_parameters())[:3]
        raise OSError("gone")

    with pytest.raises(StoreError, match="gone"):
        save_pretrained_folder(broken(), model.config, None, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_that_are_cut_off_are_refused_by_their_headers(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100, 10)}, file)
    check_weights(tmp_path)
    whole = file.read_bytes()
    for cut, words in (
        (3000, "3,000 bytes"),
        (20, "no whole safetensors"),
        (0, "no whole safetensors"),
    ):
        file.write_bytes(whole[:cut])
        with pytest.raises(SpecError, match=words):
            check_weights(tmp_path)


def test_names_of_a_body_and_of_a_model_with_a_head_are_told_from_each_other() -> None:
    """Weights of a run lie under the names of its own model, which may have a head or none."""
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    body = BertModel(config, add_pooling_layer=False)
    whole = BertForSequenceClassification(config)
    bare, headed = shapes_of(body), shapes_of(whole)
    for name in bare:
        assert name_in(whole, name, headed) == f"bert.{name}"
        assert name_in(body, f"bert.{name}", bare) == name
        assert name_in(body, name, bare) == name
    assert name_in(body, "classifier.weight", bare) == "classifier.weight"
    assert name_in(whole, "classifier.weight", headed) == "classifier.weight"


def test_a_body_by_itself_must_have_its_weights(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    BertModel(config).save_pretrained(tmp_path)
    check_fit(BertModel(config), FolderWeights(tmp_path))
    config.num_hidden_layers = 2
    with pytest.raises(SpecError, match="lacks 16 of"):
        check_fit(BertModel(config), FolderWeights(tmp_path))
