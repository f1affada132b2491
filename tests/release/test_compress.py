"""Compressed runs: what is stored of them, what they answer, what the gate keeps."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

import dray
from dray.cli import main
from dray.corpus.prepare import prepare
from dray.errors import SpecError, StoreError
from dray.models.packed import Packing, held_bytes, pack
from dray.release.compress.compress import compress
from dray.release.evaluate import evaluate
from dray.release.trained import load_trained
from dray.runs import CheckpointReader, Run, verify_checkpoint
from dray.train.driver import train_locally
from tiny import tiny_tree


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def run(storage: str, tiny_corpus: Path, local_ray: None) -> Run:
    """A trained language model."""
    tree = tiny_tree(tiny_corpus, duration={"steps": 20}, validation={"max_rows": None})
    spec = dray.make_spec(tree)
    prepare(spec, storage)
    return train_locally(spec, storage=storage, run_name="whole").run


def folder_state(folder: str) -> dict[str, int]:
    """Every file below a folder and its size."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("shape", [(7, 33), (4, 64), (3, 5, 8)])
def test_int8_codes_reconstruct_within_half_a_scale(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = pack(weight, Packing("int8"))
    off = (packed.unpacked() - weight).abs().reshape(len(weight), -1)
    assert (off <= packed.states["scales"] / 2 * (1 + 1e-6)).all()
    assert packed.num_bytes == weight.numel() + 4 * len(weight)
    assert packed.states["codes"].abs().amax() == 127


@pytest.mark.parametrize("width", [5, 32, 33, 100])
def test_int4_codes_are_two_a_byte_and_reconstruct_within_half_a_scale(width: int) -> None:
    weight = torch.randn((6, width), generator=torch.Generator().manual_seed(0))
    packed = pack(weight, Packing("int4", group=32))
    groups = -(-width // 32)
    assert packed.states["codes"].dtype == torch.uint8
    assert packed.states["codes"].shape[1] == -(-groups * min(32, width) // 2)
    scales = packed.states["scales"].repeat_interleave(min(32, width), dim=1)[:, :width]
    assert ((packed.unpacked() - weight).abs() <= scales / 2 * (1 + 1e-6)).all()


def test_a_row_of_zeros_stays_one() -> None:
    weight = torch.zeros(2, 8)
    for packing in (Packing("int8"), Packing("int4", group=4), Packing("bf16")):
        assert torch.equal(pack(weight, packing).unpacked(), weight)


def test_a_compressed_run_is_one_like_any_other(storage: str, run: Run) -> None:
    before = folder_state(run.path)
    done = compress(storage, "whole", ["int8"])
    assert folder_state(run.path) == before, "the run is never changed"
    assert (done.name, done.kept) == ("whole-int8", True)
    made = Run.open(storage, "whole-int8")
    kept = made.compressed()
    with CheckpointReader(run, run.latest_checkpoint()) as reader:
        assert kept["manifest_sha256"] == reader.manifest_sha256
    assert (kept["run"], kept["step"], kept["methods"]) == ("whole", 20, [{"name": "int8"}])
    assert made.summary()["compression"]["metrics"] == done.table["metrics"]
    assert verify_checkpoint(made, made.latest_checkpoint()).ok

    sizes = done.table["sizes"]
    assert 3.5 < sizes["before"]["weights_bytes"] / sizes["after"]["weights_bytes"] < 4
    info = made.latest_checkpoint()
    with CheckpointReader(made, info) as reader:
        assert reader.manifest.files[0].num_bytes - sizes["after"]["weights_bytes"] < 8192
    assert sizes["after"]["weights_bytes"] == sum(
        tensor.numel() * tensor.element_size() for tensor in stored(made).values()
    )
    found = evaluate(storage, "whole-int8")
    for name, row in done.table["metrics"].items():
        assert found[name] == pytest.approx(row["after"]["value"], rel=1e-6)
    assert abs(found["loss"] - evaluate(storage, "whole")["loss"]) < 0.05


def stored(run: Run) -> dict[str, torch.Tensor]:
    """The tensors of a run's checkpoint, by name and state."""
    with CheckpointReader(run, run.latest_checkpoint()) as reader:
        return {
            f"{name}|{state}": reader.read(name, state)
            for state in ("param", "buffer", "half", "codes", "scales")
            for name in reader.names(state)
        }


def test_codes_are_held_as_they_are_stored(storage: str, run: Run) -> None:
    whole = load_trained(storage, "whole").model
    packed = load_trained(storage, "whole-int8").model
    unpacked = load_trained(storage, "whole-int8", unpacked=True).model
    assert held_bytes(packed) < held_bytes(whole) == held_bytes(unpacked)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.allclose(packed(ids).logits, unpacked(ids).logits, atol=1e-5)
    for name, parameter in unpacked.named_parameters():
        codes = stored(Run.open(storage, "whole-int8")).get(f"{name}|codes")
        if codes is not None:
            assert codes.dtype == torch.int8
            assert (codes.reshape(parameter.shape).abs().amax(dim=1) == 127).all()


def test_a_flipped_byte_in_the_codes_is_found(storage: str, run: Run) -> None:
    compress(storage, "whole", ["int8"], new_name="flipped")
    made = Run.open(storage, "flipped")
    info = made.latest_checkpoint()
    path = next(Path(info.path).glob("rank-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not verify_checkpoint(made, info).ok
    assert main(["verify", "flipped", "--storage", storage]) == 3
    with pytest.raises(StoreError, match="a damaged checkpoint is never loaded"):
        load_trained(storage, "flipped")


def test_a_compressed_run_is_not_trained_on(storage: str, run: Run, tiny_corpus: Path) -> None:
    spec = run.spec()
    with pytest.raises(StoreError, match="was compressed from whole, and holds weights alone"):
        train_locally(spec, storage=storage, run_name="whole-int8")
    tree = spec.model_dump(mode="json") | {"model": {"run": "whole-int8"}, "tokenizer": None}
    with pytest.raises(SpecError, match="stored in fewer bytes"):
        train_locally(dray.make_spec(tree), storage=storage, run_name="further")
    with pytest.raises(SpecError, match="has its weights as codes already"):
        compress(storage, "whole-int8", ["bf16"])


def test_magnitude_takes_the_smallest_and_names_stay(storage: str, run: Run) -> None:
    compress(storage, "whole", ["magnitude:share=0.5"], new_name="pruned")
    before = dict(load_trained(storage, "whole").model.named_parameters())
    after = dict(load_trained(storage, "pruned").model.named_parameters())
    assert list(before) == list(after)
    zeros = {name: (p == 0) for name, p in after.items() if "layers." in name and p.dim() == 2}
    share = sum(int(z.sum()) for z in zeros.values()) / sum(z.numel() for z in zeros.values())
    assert share == pytest.approx(0.5, abs=1e-3)
    gone = torch.cat([before[name][zero].abs() for name, zero in zeros.items()])
    left = torch.cat([before[name][~zero].abs() for name, zero in zeros.items()])
    assert gone.max() <= left.min()
    for name, parameter in after.items():
        if name not in zeros:
            assert torch.equal(parameter, before[name])


def test_the_gate_keeps_nothing(storage: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir(storage))
    command = ["compress", "whole", "--storage", storage, "--with", "magnitude:share=0.95"]
    assert main([*command, "--max-drop", "loss=0.001", "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert (told["kept"], told["gate"][0]["holds"]) == (False, False)
    assert sorted(os.listdir(storage)) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--with", "int8", "--max-drop", "f2=0.1"], "'f2' is no metric of this task"),
        (["--with", "int8", "--max-drop", "loss=-1"], "is no amount"),
        (["--with", "int9"], "is no method; .* did you mean int8"),
        (["--with", "magnitude:share=1.5"], "share = 1.5: input should be less than 1"),
        (["--with", "magnitude:shard=0.5"], "shard = 0.5: extra inputs"),
        (["--with", "int8", "--with", "magnitude"], "put int8 last"),
        (["--with", "int8", "--name", "whole"], "exists already"),
        ([], "no method is given"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(
    storage: str, run: Run, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(os.listdir(storage))
    assert main(["compress", "whole", "--storage", storage, *words]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert sorted(os.listdir(storage)) == before
