"""Compressed runs: what is stored of them, what they answer, what the gate keeps."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dray
from dray.cli import main
from dray.corpus.prepare import prepare
from dray.errors import Interrupted, SpecError, StoreError
from dray.ledger import verify_ledger
from dray.models.packed import Int8Linear, Packing, held_bytes, install, pack
from dray.release.compress.compress import compress
from dray.release.compress.method import Candidate
from dray.release.compress.methods import make_methods
from dray.release.compress.recovering import Workshop
from dray.release.evaluate import evaluate
from dray.release.export import export
from dray.release.trained import load_trained
from dray.runs import CheckpointReader, Run, verify_checkpoint
from dray.runs.finished import holding_name
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
    assert (off <= packed.states["weight_scales"] / 2 * (1 + 1e-6)).all()
    assert packed.num_bytes == weight.numel() + 4 * len(weight)
    assert packed.states["weight_codes"].abs().amax() == 127


@pytest.mark.parametrize("width", [5, 32, 33, 100])
def test_int4_codes_are_two_a_byte_and_reconstruct_within_half_a_scale(width: int) -> None:
    weight = torch.randn((6, width), generator=torch.Generator().manual_seed(0))
    packed = pack(weight, Packing("int4", group=32))
    groups = -(-width // 32)
    assert packed.states["weight_codes"].dtype == torch.uint8
    assert packed.states["weight_codes"].shape[1] == -(-groups * min(32, width) // 2)
    scales = packed.states["weight_scales"].repeat_interleave(min(32, width), dim=1)[:, :width]
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
            for state in ("param", "buffer", "weight_half", "weight_codes", "weight_scales")
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
        codes = stored(Run.open(storage, "whole-int8")).get(f"{name}|weight_codes")
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


def test_a_ledger_is_of_the_run_that_was_trained(storage: str, run: Run) -> None:
    compress(storage, "whole", ["bf16"], new_name="half")
    assert main(["doctor", "half", "--storage", storage]) == 0
    with pytest.raises(StoreError, match="used no rows by steps of its own"):
        verify_ledger(Run.open(storage, "half"))


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


# ---- what methods make of a model ----------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(storage: str, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained classifier of an architecture whose heads have no size of their own."""
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    rows = [
        f"{'good fine' if n % 3 else 'bad awful'} film number {n},{int(n % 3 > 0)}"
        for n in range(300)
    ]
    path.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    tree = tiny_tree(
        path.parent,
        name="classes",
        task="sequence_classification",
        data={"train": [{"path": str(path), "text": "text", "label": "label"}]},
        model={"architecture": "bert"},
        validation={"max_rows": None},
    )
    spec = dray.make_spec(tree)
    prepare(spec, storage)
    return train_locally(spec, storage=storage, run_name="classes").run


def candidate_of(storage: str, name: str) -> Candidate:
    """A run's model, in a process that trains nothing."""
    trained = load_trained(storage, name, unpacked=True)
    workshop = Workshop(storage, "none", [], trained, train=None, say=lambda line: None)
    return Candidate(trained, trained.model, workshop.train, lambda line: None)


def applied(storage: str, name: str, text: str) -> Candidate:
    (method,) = make_methods([text])
    candidate = candidate_of(storage, name)
    method.check(candidate)
    method.apply(candidate)
    return candidate


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 35).reshape(2, 15)
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("by", ["activations", "gradients", "weights", "spaced"])
def test_a_model_of_fewer_layers_equals_a_hand_built_one(storage: str, run: Run, by: str) -> None:
    candidate = applied(storage, "whole", f"layers:keep=1,by={by},rows=4")
    assert candidate.model.config.num_hidden_layers == 1
    found, matches = logits(candidate.model), 0
    for stays in (0, 1):
        whole = load_trained(storage, "whole").model
        whole.model.layers = torch.nn.ModuleList([whole.model.layers[stays]])
        matches += torch.equal(logits(whole), found)
    assert matches == 1


@pytest.mark.parametrize("by", ["gradients", "activations", "weights"])
def test_a_narrower_model_equals_one_whose_places_give_nothing(
    storage: str, run: Run, classifier: Run, by: str
) -> None:
    """What is left answers as the whole model does where the other places are cut off."""
    for name, stem, out in (
        ("whole", "model.layers", "mlp.down_proj"),
        ("classes", "bert.encoder.layer", "output.dense"),
    ):
        candidate = applied(storage, name, f"width:share=0.5,by={by},rows=4")
        whole = load_trained(storage, name).model
        narrow = dict(candidate.model.named_parameters())
        for number in range(2):
            matrix = f"{stem}.{number}.{out}.weight"
            kept, given = narrow[matrix].detach(), whole.get_parameter(matrix)
            stays = (given.detach().T[:, None] == kept.T[None]).all(dim=-1).any(dim=1)
            assert int(stays.sum()) == kept.shape[1] < given.shape[1]
            given.data *= stays
        assert torch.allclose(logits(candidate.model), logits(whole), atol=1e-5)


def test_heads_go_in_the_groups_that_share_keys(storage: str, run: Run, classifier: Run) -> None:
    candidate = applied(storage, "whole", "heads:keep=2,rows=4")
    config = candidate.model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 2, 16)
    whole = load_trained(storage, "whole").model
    narrow = dict(candidate.model.named_parameters())
    for number in range(2):
        name = f"model.layers.{number}.self_attn.o_proj.weight"
        given, kept = whole.get_parameter(name), narrow[name].detach()
        stays = (given.detach().T[:, None] == kept.T[None]).all(dim=-1).any(dim=1)
        assert (int(stays.sum()), kept.shape[1]) == (32, 32)
        given.data *= stays
    assert torch.allclose(logits(candidate.model), logits(whole), atol=1e-5)
    with pytest.raises(SpecError, match="makes a head's size of the number of heads"):
        applied(storage, "classes", "heads:keep=2")


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_two_of_four_are_zeros(storage: str, run: Run, classifier: Run, by: str) -> None:
    whole = dict(load_trained(storage, "classes").model.named_parameters())
    candidate = applied(storage, "classes", f"two_four:by={by},rows=4")
    for name, weight in candidate.model.named_parameters():
        if "encoder.layer" in name and weight.dim() == 2:
            fours = weight.detach().reshape(len(weight), -1, 4)
            assert ((fours != 0).sum(dim=-1) == 2).all()
            if by == "weights":
                was = whole[name].detach().reshape(fours.shape).abs()
                least = was.masked_fill(fours == 0, torch.inf).amin(dim=-1)
                assert (was.masked_fill(fours != 0, 0).amax(dim=-1) <= least).all()
    with pytest.raises(SpecError, match="no matrix of rows of fours"):  # 170 places between
        applied(storage, "whole", "two_four")


@pytest.mark.parametrize("method", ["int8_dynamic", "int8_static:rows=16", "int4", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["whole", "classes"])
def test_layers_of_codes_answer_nearly_as_the_model_does(
    storage: str, run: Run, classifier: Run, name: str, method: str
) -> None:
    candidate = applied(storage, name, method)
    before = logits(candidate.model)
    size = held_bytes(candidate.model)
    model = install(candidate.model, candidate.packed)
    after = logits(model)
    off = float((after - before).norm() / before.norm())
    assert 0 < off < (0.2 if method == "int4" else 0.1), off
    assert held_bytes(model) < 0.75 * size
    has_kernels = any(isinstance(module, Int8Linear) for module in model.modules())
    assert has_kernels == method.startswith("int8_")


def test_a_folder_of_somebody_is_no_name_for_a_run(storage: str, run: Run) -> None:
    mine = Path(storage, "thesis")
    (mine / "chapters").mkdir(parents=True)
    (mine / "chapters" / "one.txt").write_text("everything")
    with pytest.raises(StoreError, match=r"holds chapters; .* nothing of others is overwritten"):
        compress(storage, "whole", ["int8"], new_name="thesis")
    with pytest.raises(StoreError, match="holds chapters"), holding_name(storage, "thesis"):
        pass
    assert (mine / "chapters" / "one.txt").read_text() == "everything"


def test_fp8_and_training_without_training_are_refused(storage: str, run: Run) -> None:
    with pytest.raises(SpecError, match=r"compute capability 8\.9"):
        applied(storage, "whole", "fp8")
    with pytest.raises(SpecError, match="no training was given"):
        compress(storage, "whole", ["layers:keep=1,recover=2"], new_name="untrained")
    assert Run.find(storage, "untrained") is None
    assert not Path(storage, "untrained").exists()


def test_a_compressed_run_is_exported_for_transformers(
    storage: str, run: Run, tmp_path: Path
) -> None:
    """From codes and from a smaller architecture: transformers answers as the run does."""
    from transformers import AutoModelForCausalLM

    compress(storage, "whole", ["layers:keep=1,by=weights", "int8"], new_name="exported")
    export(storage, "exported", str(tmp_path / "folder"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    assert theirs.config.num_hidden_layers == 1
    ours = load_trained(storage, "exported").model
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-5)


# ---- training what is left -----------------------------------------------------------------------


def zeros_of(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: p.detach() == 0
        for name, p in model.named_parameters()
        if "layers." in name and p.dim() == 2
    }


KILLED = """
import os, signal, sys
from dray.release.compress.compress import compress
from dray.train.driver import train_locally

def killed(spec, **given):
    asked = iter([False] * 3)
    train_locally(spec, **given, stop=lambda: next(asked, True))
    os.kill(os.getpid(), signal.SIGKILL)

compress(sys.argv[1], "whole", sys.argv[2:], new_name="sparse", train=killed)
"""


def test_zeros_stay_through_recovery_and_through_a_kill(storage: str, run: Run) -> None:
    """The first process is killed within its training; the second one goes on with it."""
    methods = ["magnitude:share=0.6,recover=8"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, storage, *methods], capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert Run.find(storage, "sparse") is None
    begun = Run.open(f"{storage}/sparse/work", "1-magnitude-1-trained").latest_checkpoint()
    assert begun is not None
    assert 0 < begun.step < 8
    done = compress(storage, "whole", methods, new_name="sparse", train=train_locally)
    assert done.kept
    assert not Path(storage, "sparse", "work").exists()
    once = applied(storage, "whole", "magnitude:share=0.6").model
    zeros, found = zeros_of(once), zeros_of(load_trained(storage, "sparse").model)
    assert all(torch.equal(zeros[name], found[name]) for name in zeros)
    before, after = (
        dict(m.named_parameters()) for m in (once, load_trained(storage, "sparse").model)
    )
    assert any(not torch.equal(before[name], after[name]) for name in zeros), "it was trained"


@pytest.mark.slow
def test_what_moved_towards_zero_becomes_zero(storage: str, run: Run) -> None:
    """Of a run that is trained on: what grew least, and nothing else."""
    kept: dict[str, torch.Tensor] = {}

    def watched(spec: Any, **given: Any) -> Any:
        ended = train_locally(spec, **given)
        model = load_trained(given["storage"], given["run_name"]).model
        kept.update((name, p.detach().clone()) for name, p in model.named_parameters())
        return ended

    methods = ["movement:share=0.3,steps=4"]
    compress(storage, "whole", methods, new_name="moved", train=watched)
    before = dict(load_trained(storage, "whole").model.named_parameters())
    after = zeros_of(load_trained(storage, "moved").model)
    grown = {name: kept[name].square() - before[name].detach().square() for name in after}
    gone = torch.cat([grown[name][zero] for name, zero in after.items()])
    left = torch.cat([grown[name][~zero] for name, zero in after.items()])
    assert len(gone) == int(0.3 * (len(gone) + len(left)))
    assert gone.max() <= left.min()


@pytest.mark.slow
def test_what_was_trained_outlives_an_interruption(storage: str, run: Run) -> None:
    """Of a failed gate nothing does, of an interrupted call what the next one goes on with."""

    def interrupted(spec: Any, **given: Any) -> Any:
        train_locally(spec, **given)
        raise Interrupted(2)

    methods = ["layers:keep=1,by=weights,recover=2"]
    with pytest.raises(Interrupted):
        compress(storage, "whole", methods, new_name="later", train=interrupted)
    assert Run.find(storage, "later") is None
    trained = f"{storage}/later/work"
    assert Run.open(trained, "1-layers-1-trained").status == "completed"
    with pytest.raises(StoreError, match="not found"):
        Run.open(storage, "later")
    done = compress(
        storage, "whole", methods, new_name="later", train=train_locally, max_drop=["loss=0"]
    )
    assert done.kept == done.table["gate"][0]["holds"]
    assert Path(storage, "later").exists() == done.kept
    assert not Path(trained).exists()


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher(storage: str, run: Run, classifier: Run) -> None:
    for name in ("whole", "classes"):
        teacher = logits(load_trained(storage, name).model)
        dropped = logits(applied(storage, name, "layers:keep=1").model)
        methods = ["layers:keep=1", "distil:steps=12,share=1,rate=0.003,hidden=0.1,attention=0.1"]
        done = compress(storage, name, methods, new_name=f"{name}-student", train=train_locally)
        assert done.kept
        student = logits(load_trained(storage, f"{name}-student").model)

        def apart(found: torch.Tensor, teacher: torch.Tensor = teacher) -> float:
            return float((teacher.softmax(-1) - found.softmax(-1)).norm())

        assert apart(student) < apart(dropped)
