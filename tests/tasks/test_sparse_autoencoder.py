"""Features of what a block computes: their loss, what is measured of them, and that they are found
where hidden states are made of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, T5Config, T5Model

from dray.cli import main
from dray.corpus.prepare import prepare
from dray.corpus.shards import make_batch, stored_columns
from dray.errors import SpecError
from dray.models.build import build_model
from dray.models.counting import count_model
from dray.models.freezing import is_base
from dray.release.exported import open_exported
from dray.release.predict import Predictor
from dray.release.trained import load_trained
from dray.runs import Run
from dray.spec import Spec, make_spec
from dray.tasks.parts.dictionary import Dictionary, DictionaryLoss, add_dictionary, comparable
from dray.tasks.parts.dictionary_metrics import DictionaryMetrics
from dray.tasks.sparse_autoencoder import SparseAutoencoder
from dray.train import train_locally
from task_cases import CASES, make, sentence

Settings = SparseAutoencoder.Settings
WIDTH = 16


def bert(blocks: int = 3) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=20, num_hidden_layers=blocks, hidden_dropout_prob=0.5, **sizes)
    return BertModel(config, add_pooling_layer=False)


def llama(blocks: int = 3) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 16}
    return LlamaModel(LlamaConfig(vocab_size=20, num_hidden_layers=blocks, **sizes))


def some_batch() -> dict[str, Tensor]:
    ids = torch.arange(2 * 6).reshape(2, 6) + 4
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    return {"input_ids": ids, "attention_mask": mask, "places": torch.tensor([1, 2, 7, -1])}


@pytest.mark.parametrize("make_model", [bert, llama])
def test_states_are_those_of_the_whole_model_behind_the_block(make_model: Any) -> None:
    whole, cut, batch = make_model().eval(), make_model(), some_batch()
    seen: list[Any] = []
    stack = whole.encoder.layer if hasattr(whole, "encoder") else whole.layers
    stack[1].register_forward_hook(lambda *args: seen.append(args[2]))
    whole(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    wanted = output.flatten(0, 1)[batch["places"][:3]]
    wanted = wanted - wanted.mean(dim=1, keepdim=True)
    settings = Settings(block=1, features=8, top_k=2)
    add_dictionary(cut, settings)
    assert cut.config.num_hidden_layers == 2
    loss = DictionaryLoss(cut, settings, counts=True, dense=False).train()
    found = loss.states(batch)  # in training, too, nothing is dropped
    torch.testing.assert_close(found[:3], wanted / wanted.norm(dim=1, keepdim=True))


def test_a_loss_is_what_its_formula_says() -> None:
    torch.manual_seed(1)
    states, model, batch = comparable(torch.randn(4, WIDTH)), bert(), some_batch()
    settings = Settings(block=0, features=8, top_k=2, auxiliary=0.5, auxiliary_top_k=3)
    add_dictionary(model, settings)
    own = model.dictionary
    with torch.no_grad():
        own.decoder_weight.mul_(torch.rand(8, 1) + 0.5)  # lengths of directions do not count
        own.decoder_bias.uniform_(-0.1, 0.1)
        own.encoder_bias.uniform_(-0.1, 0.1)
    silent = torch.tensor([True] * 5 + [False] * 3)
    given = {"states": states, "places": batch["places"], "silent": silent}
    loss = DictionaryLoss(model, settings, counts=True, dense=False)
    terms, _ = loss(given)
    directions = own.decoder_weight / own.decoder_weight.norm(dim=1, keepdim=True)
    wanted = torch.zeros(())
    for state in states[:3]:
        before = own.encoder_weight @ (state - own.decoder_bias) + own.encoder_bias
        order = before.argsort(descending=True)
        said = own.decoder_bias + sum(before[i].clamp(min=0) * directions[i] for i in order[:2])
        left = state - said
        others = [i for i in order if silent[i]][:3]
        rest = sum(before[i].clamp(min=0) * directions[i] for i in others)
        wanted = wanted + left.square().sum() + 0.5 * (left.detach() - rest).square().sum()
    total, count = terms["loss"]
    torch.testing.assert_close(total, wanted)
    assert int(count) == 3
    total.backward()
    found = own.decoder_weight.grad
    wanted_gradient = torch.autograd.grad(wanted, own.decoder_weight)[0]
    torch.testing.assert_close(found, wanted_gradient)
    none = loss({**given, "silent": torch.zeros(8, dtype=torch.bool)})[0]["loss"][0]
    plain = loss({"states": states, "places": batch["places"]})[0]["loss"][0]
    torch.testing.assert_close(none, plain)  # where no feature is silent nothing is added


def test_by_l1_the_sum_of_features_is_a_part_of_the_loss() -> None:
    states, model, batch = comparable(torch.randn(4, WIDTH)), bert(), some_batch()
    settings = Settings(block=0, features=8, l1=0.25)
    add_dictionary(model, settings)
    loss = DictionaryLoss(model, settings, counts=False, dense=False)
    terms, _ = loss({"states": states, "places": batch["places"]})
    own = model.dictionary
    features = F.relu(states[:3] @ own.encoder_weight.T)
    said = features @ F.normalize(own.decoder_weight, dim=1)
    wanted = (states[:3] - said).square().sum() + 0.25 * features.sum()
    torch.testing.assert_close(terms["loss"][0], wanted)


def test_metrics_are_those_of_all_tokens_however_they_are_parted() -> None:
    torch.manual_seed(2)
    settings = Settings(block=0, features=8, top_k=2)
    model = bert()
    add_dictionary(model, settings)
    loss = DictionaryLoss(model, settings, counts=True, dense=True).eval()
    states = comparable(torch.randn(40, WIDTH) + 1.0)
    parts = [{"states": part, "places": torch.tensor([*range(9), -1])} for part in states.split(10)]
    metrics = [DictionaryMetrics(8) for _ in range(2)]
    kept, fired = [], []
    with torch.no_grad():
        for number, part in enumerate(parts):
            _, output = loss(part)
            metrics[number % 2].update(part, output)
            kept.append((part["states"][:9], output["errors"][:9]))
            fired.append(output["activations"][:9] > 0)
    whole = DictionaryMetrics(8).merge(one.state() for one in metrics)
    values = whole.compute()
    x, errors, fires = torch.cat([k[0] for k in kept]), torch.cat([k[1] for k in kept]), fired
    variance = (x - x.mean(dim=0)).square().sum()
    assert values["explained"] == pytest.approx(1 - float(errors.sum() / variance), abs=1e-5)
    assert values["loss"] == pytest.approx(float(errors.mean()), rel=1e-6)
    assert values["l0"] == pytest.approx(float(torch.cat(fires).sum(dim=1).float().mean()))
    assert values["dead_share"] == pytest.approx(
        float((~torch.cat(fires).any(dim=0)).float().mean())
    )
    assert values["num_targets"] == 36
    empty = DictionaryMetrics(8)
    assert set(empty.undefined()) == {"loss", "explained", "l0", "dead_share"}


def learn(auxiliary: float, directions: Tensor, steps: int = 200) -> tuple[Dictionary, Tensor]:
    """A dictionary that has learnt states of three of the directions each; and states."""
    torch.manual_seed(3)
    settings = Settings(
        block=0, features=len(directions), top_k=3, auxiliary=auxiliary, auxiliary_top_k=8
    )
    model = nn.Module()
    model.dictionary = Dictionary(
        directions.shape[1], settings, device=torch.device("cpu"), dtype=torch.float32
    )

    def draw() -> Tensor:
        chosen = torch.rand(256, len(directions)).topk(3, dim=1).indices
        strengths = torch.rand(256, 3) + 0.5
        return F.normalize((directions[chosen] * strengths[..., None]).sum(dim=1), dim=1)

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        states = draw()
        with torch.no_grad():
            told = model.dictionary(states, dense=True)
            silent = ~(told["activations"] > 0).any(dim=0)
        told = model.dictionary(states, silent)
        left = states - told["found"]
        loss = left.square().sum()
        if bool(silent.any()):
            loss = loss + auxiliary * (left.detach() - told["rest"]).square().sum()
        optimizer.zero_grad()
        (loss / len(states)).backward()
        optimizer.step()
    return model.dictionary.requires_grad_(False), draw()


def test_it_finds_the_directions_that_states_are_made_of() -> None:
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(24, 32), dim=1)
    found, states = learn(1 / 32, directions)
    cosines = (F.normalize(found.decoder_weight, dim=1) @ directions.T).max(dim=0).values
    assert float(cosines.median()) > 0.95
    left = states - found(states)["found"]
    assert float(left.square().sum(dim=1).mean()) < 0.06


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ({"block": 0, "features": 8}, "neither is given"),
        ({"block": 0, "features": 8, "top_k": 2, "l1": 0.1}, "both are given"),
        ({"block": 0, "features": 0, "top_k": 1}, "features"),
        ({"block": 0, "features": 8, "top_k": 9}, "there are 8 features"),
        ({"block": 0, "features": 8, "l1": 0.1, "auxiliary": 0.1}, "it goes with top_k"),
        ({"block": -1, "features": 8, "top_k": 1}, "block"),
        ({"features": 8, "top_k": 1}, "block is missing"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    tmp_path: Path, task: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SpecError, match=problem):
        make("sparse_autoencoder", tmp_path, task={"name": "sparse_autoencoder", **task})


@pytest.mark.parametrize(
    "sections",
    [
        {"adapters": {"name": "lora", "rank": 2}},
        {"freezing": {"blocks": 1}},
        {"regularization": {"dropout": 0.1}},
        {"regularization": {"adversarial": {"name": "fgm", "epsilon": 0.1}}},
        {"distil": {"run": "other"}},
    ],
)
def test_what_a_model_that_stays_as_it_is_cannot_have_is_refused(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    with pytest.raises(SpecError, match="stays as it is"):
        make("sparse_autoencoder", tmp_path, **sections)


def test_a_model_without_the_block_is_refused(tmp_path: Path) -> None:
    spec = make(
        "sparse_autoencoder",
        tmp_path,
        task={"name": "sparse_autoencoder", "block": 2, "features": 8, "top_k": 1},
    )
    with pytest.raises(SpecError, match="the model has 2 blocks"):
        count_model(spec, vocab_size=300)
    config = T5Config(vocab_size=20, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=16)
    with pytest.raises(SpecError, match="reads and writes apart"):
        add_dictionary(T5Model(config), Settings(block=0, features=8, top_k=1))


def test_the_plan_counts_what_stays_and_what_is_added(tmp_path: Path) -> None:
    spec = make("sparse_autoencoder", tmp_path)
    counted = count_model(spec, vocab_size=300, pad_token_id=0)
    model = build_model(spec, vocab_size=300, pad_token_id=0)
    parameters = dict(model.named_parameters())
    added = {name: p.numel() for name, p in parameters.items() if not is_base(p)}
    assert set(added) == {
        f"dictionary.{name}"
        for name in ("encoder_weight", "encoder_bias", "decoder_weight", "decoder_bias")
    }
    assert counted.count.trained == sum(added.values())
    assert counted.count.total == sum(p.numel() for p in parameters.values())
    assert counted.layers == 1  # what lies behind the block is not there
    width, features, tokens = 32, 96, spec.row_tokens
    once = (
        2 * tokens * sum(p.numel() for n, p in parameters.items() if "layer" in n and p.dim() > 1)
    )
    assert counted.row is not None
    encodes = 3 * 2 * tokens * width * features
    assert counted.row.flops == pytest.approx(once + encodes + 4 * tokens**2 * width, rel=0.01)


def test_neither_padding_nor_special_tokens_are_learnt_from() -> None:
    task = SparseAutoencoder(Settings(block=0, features=8, top_k=1))
    task.pad_token_id = 0
    tokens = np.array([[1, 7, 8, 2], [1, 9, 2, 0], [1, 9, 2, 0]], np.uint32)
    inner = np.array([[0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0]], np.uint8)
    values = {"input_ids": tokens, "num_tokens": np.array([4, 3, 3], np.int32), "inner": inner}
    rows = pa.Table.from_batches([make_batch(stored_columns(task, 4, "uint32"), values)])
    batch = task.collate(rows.append_column("row_id", pa.array([0, 1, -1])))
    assert task.num_targets(batch) == 3
    assert batch["places"][:3].tolist() == [1, 2, 5]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    """A classifier's run `classes`, and features of its first block, `features`."""
    folder = tmp_path_factory.mktemp("features")
    drawn = random.Random(0)
    lines = [
        json.dumps({"text": sentence(drawn), "label": "ab"[drawn.randrange(2)]}) for _ in range(80)
    ]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    classes = make("sequence_classification", folder, duration={"steps": 4})
    runs = str(folder / "runs")
    for spec, name in ((classes, "classes"), (features_of(folder), "features")):
        prepare(spec, runs)
        train_locally(spec, storage=runs, run_name=name)
    return folder


def features_of(folder: Path, **task: Any) -> Spec:
    given = {"name": "sparse_autoencoder", **CASES["sparse_autoencoder"].task, **task}
    sections = {"model": {"run": "classes"}, "tokenizer": {"run": "classes"}}
    place = {"resources": {"workers": 1}, "zero": {"stage": 0}}
    return make(
        "sparse_autoencoder", folder, task=given, duration={"steps": 12}, **sections, **place
    )


def test_a_run_of_features_holds_the_dictionary_alone_and_learns(storage: Path) -> None:
    run = Run.open(str(storage / "runs"), "features")
    losses = [row["loss"] for row in run.metrics()]
    assert losses[-1] < losses[0]
    (info,) = run.checkpoints()[-1:]
    trained = load_trained(str(storage / "runs"), "features")
    base = load_trained(str(storage / "runs"), "classes")
    assert info.num_bytes < base.checkpoint.num_bytes
    theirs = base.model.bert.encoder.layer[0].state_dict()
    for name, value in trained.model.encoder.layer[0].state_dict().items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=0)
    assert len(trained.model.encoder.layer) == 1
    pins = [path.name for path in (storage / "runs" / "classes" / "pins").iterdir()]
    assert any("features" in name for name in pins)


def test_what_cannot_be_is_refused_before_anything_is_written(storage: Path) -> None:
    runs = storage / "runs"
    before = sorted(path.name for path in runs.iterdir())
    for spec, problem in (
        (features_of(storage, block=2), "the model has 2 blocks"),
        (
            make_spec({**features_of(storage).model_dump(mode="json"), "model": {"run": "none"}}),
            "none",
        ),
    ):
        with pytest.raises(Exception, match=problem):
            train_locally(spec, storage=str(runs), run_name="other")
    assert sorted(path.name for path in runs.iterdir()) == before


def test_predict_and_explain_tell_what_features_fire_on(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, data = str(storage / "runs"), str(storage / "a.jsonl")
    place = ["features", "--storage", runs, "--data", data]
    assert main(["explain", *place, "--rows", "30", "--features", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_records"] == 30
    shares = [one["share"] for one in found["features"]]
    assert len(shares) == 3
    assert shares == sorted(shares, reverse=True)
    for one in found["features"]:
        values = [token["activation"] for token in one["tokens"]]
        assert values == sorted(values, reverse=True)
        for token in one["tokens"]:
            assert token["tokens"][token["at"]] == token["token"]
            assert token["activations"][token["at"]] == token["activation"] > 0
    page = storage / "page.html"
    assert main(["explain", *place, "--features", "2", "--html", str(page)]) == 0
    assert "Feature " in page.read_text(encoding="utf-8")
    assert "fire on" in capsys.readouterr().out
    out = storage / "told.jsonl"
    assert main(["predict", *place, "--out", str(out)]) == 0
    told = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(told) == 80
    for record in told:
        strengths = [one["activation"] for one in record["prediction"]]
        assert strengths
        assert strengths == sorted(strengths, reverse=True)
        assert all(one["token"].strip("Ġ") in record["text"] for one in record["prediction"])


def test_an_exported_folder_predicts_the_same(storage: Path) -> None:
    runs, folder = str(storage / "runs"), storage / "exported"
    assert main(["export", "features", str(folder), "--storage", runs]) == 0
    opened = open_exported(str(folder))
    assert opened is not None
    records = [{"text": "red old cold"}, {"text": "new warm"}]
    here = Predictor(load_trained(runs, "features")).predict(records)
    there = Predictor(opened).predict(records)
    assert [one.told for one in here] == [one.told for one in there]
