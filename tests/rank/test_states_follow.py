"""The states follow to any place: what one ZeRO stage at one number of ranks saved, all others
restore, each tensor.

Real DeepSpeed over gloo, and dray's own Saver and reader. What the engine holds after a restore is
asked of DeepSpeed and torch, not of the fragments that the restore itself goes by. fp16 is computed
by torch although DeepSpeed holds this CPU incapable of it: that one answer is set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dray.plan import Plan, make_plan, parse_shape
from dray.plan.zero_config import make_buckets, make_deepspeed_config
from dray.rank.group import Ranks
from dray.runs import CheckpointReader, Run, create_run, verify_checkpoint
from dray.runs.checkpoint_reader import HEADER_BYTES
from dray.runs.commit import CHUNK_BYTES
from dray.spec import Spec, make_spec
from rank_host import RankHost
from tiny import tiny_tree

VOCAB, WIDTH, ROW_TOKENS, GLOBAL_ROWS, MICRO_ROWS = (
    61,
    10,
    8,
    12,
    2,
)  # odd sizes: no partition comes out even
STATES = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "adamw_8bit": ("exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"),
    "sgd": ("momentum_buffer",),
    "lion": ("exp_avg",),
    "adafactor": ("variance", "row_var", "col_var"),
    "muon": ("exp_avg", "exp_avg_sq", "momentum_buffer"),
}
"""What each optimiser may keep for a parameter."""
TRAINED_STEPS, LATER_STEPS = 4, 2
SCALE_WINDOW, OVERFLOWING_STEP = (
    2,
    2,
)  # fp16: the scale grows at step 5, from what is carried of steps 3 and 4


class Place(NamedTuple):
    """Where a run trains."""

    stage: int
    ranks: int
    precision: str = "fp32"
    offload: str = "none"
    optimizer: str = "adamw"
    """With `.ema` an average of the weights is kept, too."""

    @property
    def states(self) -> tuple[str, ...]:
        name, _, ema = self.optimizer.partition(".")
        return (*STATES[name], *([ema] if ema else ()))

    def __str__(self) -> str:
        return "-".join(map(str, self))


class Model(nn.Module):
    """A head tied to the embedding, a frozen layer, buffers that are saved and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 33)
        self.down = nn.Linear(33, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("level", torch.zeros(2, 3))
        self.register_buffer("num_passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("angles", torch.linspace(0.5, 1.5, WIDTH), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        if self.training:
            self.num_passes += 1
            self.level += 0.5
        hidden = self.embedding(ids) * self.angles.to(self.norm.weight.dtype)
        hidden = hidden + self.frozen(self.norm(hidden))
        return self.head(hidden + self.down(torch.relu(self.up(hidden))))


class Wide(nn.Module):
    """Six million parameters in layers of equal size: a checkpoint far larger than any buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(24)])


def make_place(place: Place) -> tuple[Spec, Plan]:
    name, _, ema = place.optimizer.partition(".")
    spec = make_spec(
        tiny_tree(
            Path("none"),
            batch={"global_rows": GLOBAL_ROWS, "micro_rows": MICRO_ROWS},
            data={"sequence_tokens": 16},
            resources={"workers": place.ranks},
            zero={"stage": place.stage, "offload": place.offload},
            optimizer={"name": name, "learning_rate": 1e-3}
            | ({"least_elements": 1} if name == "adamw_8bit" else {}),
            regularization={"ema": {"decay": 0.5}} if ema else {},
        )
    )
    plan = make_plan(spec, parse_shape("1xCPU(cpus=8,memory=16GB,bf16=1)"), with_ray=False)
    # Small enough that the tiny model has several buckets, sub-groups, and parameters that stay
    # partitioned.
    config = make_deepspeed_config(
        place.stage,
        place.offload,
        micro_rows=MICRO_ROWS,
        accumulation=GLOBAL_ROWS // MICRO_ROWS // place.ranks,
        precision=place.precision,
        clip_grad_norm=1.0,
        buckets=make_buckets(300, 100, on_gpu=False),
        on_gpu=False,
    )
    config["fp16"] |= {"loss_scale_window": SCALE_WINDOW, "initial_scale_power": 8}
    if place.stage == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 50
    return spec, plan.model_copy(update={"deepspeed": config, "precision": place.precision})


def build(place: Place, ranks: Ranks, *, initial: bool, kind: type[nn.Module] = Model) -> Any:
    """The engine, with its weights, or with those that a restore is to replace."""
    from deepspeed.accelerator import get_accelerator

    import dray.models.groups
    from dray.models.groups import parameter_groups
    from dray.rank.chance import Chance
    from dray.rank.engine import build_engine
    from dray.rank.hooks import build_hooks

    get_accelerator().is_fp16_supported = lambda: True
    dray.models.groups.find_blocks = lambda model: [model.up, model.down]
    spec, plan = make_place(place)

    def build_model(constructing: Any, gathering: Any) -> nn.Module:
        with constructing:
            model = kind()
        generator = torch.Generator().manual_seed(3 if initial else 4)
        for parameter in model.parameters():
            with gathering([parameter]), torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model

    return build_engine(
        build_model,
        lambda model: parameter_groups(model, 0.1),
        spec.optimizer,
        plan,
        ranks,
        hooks=build_hooks(spec, Chance()),
    )


def train_step(engine: Any, ranks: Ranks, step: int, rate: float = 1e-3) -> tuple[float, float]:
    """One step on the rows of that step, which do not depend on the place. Returns the global loss
    and the norm."""
    rows = torch.randint(
        0, VOCAB, (GLOBAL_ROWS, ROW_TOKENS), generator=torch.Generator().manual_seed(step)
    )
    mine = rows[ranks.rank * (share := GLOBAL_ROWS // ranks.num_ranks) :][:share]
    targets, total = GLOBAL_ROWS * (ROW_TOKENS - 1), 0.0
    engine.train(True)
    for at in range(0, share, MICRO_ROWS):
        ids = mine[at : at + MICRO_ROWS]
        logits = engine(ids=ids)[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits.reshape(-1, VOCAB), ids[:, 1:].reshape(-1), reduction="sum"
        )
        blow_up = 1e9 if step == OVERFLOWING_STEP and engine.loss_scale > 1 else 1.0
        engine.backward(loss * blow_up * ranks.num_ranks / targets, last=at + MICRO_ROWS >= share)
        total += float(loss.detach())
    norm = float(engine.step(rate).grad_norm)
    return float(ranks.total(torch.tensor(total, dtype=torch.float64))) / targets, norm


def held(engine: Any, place: Place) -> dict[str, Tensor]:
    """Every state as a whole tensor, by `name|state`, as DeepSpeed and torch hold it; the same on
    every rank."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found: dict[str, Tensor] = {}
    wrapper = engine._wrapper
    masters: dict[int, Tensor] = {}
    if place.stage == 0 and place.precision != "fp32":
        for halves, wholes in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            masters |= dict(zip(map(id, halves), wholes, strict=True))
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            used = parameter.detach().clone()
        found[f"{name}|used"] = used
        if not parameter.requires_grad:
            found[f"{name}|param"] = used.float()
        elif place.stage:
            found[f"{name}|param"] = safe_get_full_fp32_param(parameter)
            found |= {
                f"{name}|{state}": safe_get_full_optimizer_state(parameter, state)
                for state in place.states
            }
        else:
            master = masters.get(id(parameter), parameter)
            found[f"{name}|param"] = master.detach()
            kept = engine._optimizer.state[master]
            assert kept.keys() - {"step"} <= set(place.states)
            found |= {f"{name}|{state}": kept[state] for state in kept if state != "step"}
    found |= {f"{name}|buffer": buffer for name, buffer in engine.module.named_buffers()}
    steps = {float(s["step"]) for s in engine._optimizer.state.values() if "step" in s}
    assert len(steps) <= 1, steps  # not all optimisers count
    found["|step"] = torch.tensor(steps.pop() if steps else float(engine.num_updates))
    return {key: value.detach().clone().reshape(-1) for key, value in found.items()}


def save(engine: Any, ranks: Ranks, place: Place, run: Run, step: int) -> None:
    """Commit a checkpoint as the training loop does."""
    from dray.rank.saving import Saver

    saver = Saver(
        run, 1, make_place(place)[0], engine=engine, ranks=ranks, wait_stored=lambda: None
    )
    shapes = {name: list(shape) for name, shape in engine.parameter_shapes.items()}
    shapes |= {name: list(buffer.shape) for name, buffer in engine.buffers().items()}
    metadata = {
        "shapes": shapes,
        "state_shapes": engine.state_shapes,
        "optimizer_step": engine.num_updates,
        "loss_scale": engine.loss_scale_state(),
    }
    saver.begin(step, metadata)
    outcome = saver.finish(last=True)
    assert outcome is not None
    assert not outcome.problem


def train_and_save(ranks: Ranks, storage: str, place: Place) -> None:
    """Train, save, note what is held, and what the steps after it come to."""
    run, engine = Run.open(storage, str(place)), build(place, ranks, initial=True)
    assert len(engine._optimizer.param_groups) >= 2  # with weight decay and without
    for step in range(1, TRAINED_STEPS + 1):
        train_step(engine, ranks, step)
    save(engine, ranks, place, run, TRAINED_STEPS)
    note = {
        "held": held(engine, place),
        "scale": engine.loss_scale_state(),
        "updates": engine.num_updates,
    }
    note["later"] = go_on(engine, ranks, place)
    if place.precision == "fp16":
        assert note["updates"] == TRAINED_STEPS - 1
        assert note["later"]["scales"][0] > note["scale"]["scale"]
    if ranks.rank == 0:
        torch.save(note, f"{storage}/{place}.pt")


def go_on(engine: Any, ranks: Ranks, place: Place) -> dict[str, Any]:
    """What the steps after the checkpoint come to."""
    found = [
        (*train_step(engine, ranks, TRAINED_STEPS + 1 + later), engine.loss_scale)
        for later in range(LATER_STEPS)
    ]
    losses, norms, scales = zip(*found, strict=True)
    return {"losses": losses, "norms": norms, "scales": scales, "held": held(engine, place)}


def restore_each(
    ranks: Ranks, storage: str, place: Place, sources: list[Place]
) -> dict[Place, float]:
    """Restore what each of the sources saved, compare it, and train on; returns relative
    differences."""
    engine, differences = build(place, ranks, initial=False), {}
    for number, source in enumerate(sources):
        if number:
            train_step(
                engine, ranks, 1
            )  # leaves ZeRO-3's small parameters gathered: they must not stay as they were
        run, note = Run.open(storage, str(source)), torch.load(f"{storage}/{source}.pt")
        with CheckpointReader(run, run.latest_checkpoint()) as reader:
            engine.restore(reader, reader.metadata["optimizer_step"], reader.metadata["loss_scale"])
        check_equal(held(engine, place), note["held"], f"{source} restored in {place}")
        assert engine.loss_scale_state() == note["scale"]
        later, expected = go_on(engine, ranks, place), note["later"]
        assert later["scales"] == expected["scales"]
        pairs = [
            pair
            for key in ("losses", "norms")
            for pair in zip(later[key], expected[key], strict=True)
        ]
        differences[source] = max(abs(found - wanted) / wanted for found, wanted in pairs)
        if place == source:
            check_equal(later["held"], expected["held"], f"{place}, {LATER_STEPS} steps later")
    return differences


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), f"{key} differs: {where}"


def follow(
    host: RankHost, storage: Path, sources: list[Place], places: list[Place]
) -> dict[Any, float]:
    """Save in each source, restore all of them in each place; differences of loss and norm by
    (source, place)."""
    for source in sources:
        run = create_run(
            str(storage),
            str(source),
            make_place(source)[0],
            {"num_steps": 9, "num_ranks": source.ranks},
        )
        run.begin_attempt(num_ranks=source.ranks, start_step=0)
        host.run(train_and_save, source.ranks, str(storage), source)
        report = verify_checkpoint(run, run.latest_checkpoint())
        assert report.ok, report.problems
    return {
        (source, place): difference
        for place in places
        for source, difference in host.run(restore_each, place.ranks, str(storage), place, sources)[
            0
        ].items()
    }


EVERYWHERE = [Place(stage, ranks) for stage in range(4) for ranks in (1, 2, 3)]
OFFLOADED = [
    Place(1, 2, "fp32", "optimizer"),
    Place(2, 3, "fp32", "optimizer"),
    Place(3, 2, "fp32", "parameters"),
]


def test_fp32_in_every_place(host: RankHost, tmp_path: Path) -> None:
    sources = [Place(0, 2), Place(1, 3), Place(2, 1), Place(3, 2)]
    differences = follow(host, tmp_path, sources, EVERYWHERE + OFFLOADED)
    for (source, place), difference in differences.items():
        assert difference <= (0 if source == place else 1e-6), (str(source), str(place))


@pytest.mark.parametrize(
    ("precision", "within"), [pytest.param("bf16", 2e-3, marks=pytest.mark.slow), ("fp16", 1e-3)]
)
def test_half_precision_in_every_stage(
    host: RankHost, tmp_path: Path, precision: str, within: float
) -> None:
    sources = [Place(0, 2, precision), Place(1, 3, precision), Place(3, 2, precision)]
    offloaded = [Place(2, 2, precision, "optimizer"), Place(3, 1, precision, "parameters")]
    differences = follow(host, tmp_path, sources, [*sources, Place(2, 1, precision), *offloaded])
    for (source, place), difference in differences.items():
        assert difference <= (0 if source == place else within), (str(source), str(place))


def learn(ranks: Ranks, place: Place, rate: float) -> tuple[list[float], list[float]]:
    """Losses of steps on the same rows, and an average of weights after them, if one is kept."""
    engine = build(place, ranks, initial=True)
    losses = [train_step(engine, ranks, 1, rate)[0] for _ in range(12)]
    return losses, held(engine, place).get("up.weight|ema", torch.empty(0)).tolist()


@pytest.mark.parametrize(
    ("optimizer", "rate"), [("sgd.ema", 0.5), ("lion", 1e-2), ("adamw.ema", 1e-2)]
)
def test_what_goes_by_elements_learns_alike_under_every_stage(
    host: RankHost, optimizer: str, rate: float
) -> None:
    places = [Place(stage, 2, optimizer=optimizer) for stage in range(4)]
    (losses, average), *others = [host.run(learn, 2, place, rate)[0] for place in places]
    assert losses[-1] < 0.8 * losses[0]
    assert bool(average) is optimizer.endswith("ema")
    for losses_there, average_there in others:
        assert losses_there == pytest.approx(losses, rel=1e-4)
        assert average_there == pytest.approx(average, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "rate"), [("adafactor", 0.1), ("muon.ema", 3e-2), ("adamw_8bit", 3e-2)]
)
def test_what_goes_by_matrices_learns_alike_at_any_number_of_ranks(
    host: RankHost, optimizer: str, rate: float
) -> None:
    alone, three = (
        host.run(learn, ranks, Place(0, ranks, optimizer=optimizer), rate)[0][0] for ranks in (1, 3)
    )
    assert alone[-1] < 0.8 * alone[0]
    assert three == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd.ema", "lion.ema"])
def test_states_of_other_optimizers_follow_to_every_stage(
    host: RankHost, tmp_path: Path, optimizer: str
) -> None:
    sources = [Place(0, 2, optimizer=optimizer), Place(2, 3, optimizer=optimizer)]
    others = [
        Place(1, 2, "fp32", "optimizer", optimizer),
        Place(3, 1, optimizer=optimizer),
        Place(3, 3, "fp32", "parameters", optimizer),
    ]
    differences = follow(host, tmp_path, sources, [*sources, *others])
    for (source, place), difference in differences.items():
        assert difference <= (0 if source == place else 1e-5), (str(source), str(place))


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        ("adafactor.ema", "fp32"),
        ("muon", "fp32"),
        ("muon.ema", "bf16"),
        ("adamw_8bit.ema", "fp32"),
        ("adamw_8bit", "bf16"),
    ],
)
def test_states_of_whole_matrices_follow_to_any_number_of_ranks(
    host: RankHost, tmp_path: Path, optimizer: str, precision: str
) -> None:
    """Shaped otherwise than their parameters, and other ones for other parameters."""
    places = [Place(0, ranks, precision, optimizer=optimizer) for ranks in (1, 2, 3)]
    differences = follow(host, tmp_path, places[1:], places)
    for (source, place), difference in differences.items():
        within = 0 if source == place else 1e-4 if precision == "fp32" else 1e-2
        assert difference <= within, (str(source), str(place))


def average_by_hand(ranks: Ranks, place: Place) -> None:
    """Keep the average of whole weights besides, a step without an update among them."""
    engine = build(place, ranks, initial=True)
    weights = {k: v.double() for k, v in held(engine, place).items() if k.endswith("|param")}
    mine = {key: value.clone() for key, value in weights.items()}
    for step in (1, 2, 3):
        train_step(engine, ranks, step, 0.1)
        decay = min(0.5, (1 + step) / (10 + step))
        now = held(engine, place)
        for key, average in mine.items():
            average += (1 - decay) * (now[key].double() - average)
    engine.backward(engine(ids=torch.arange(8)[None]).float().sum(), last=True)
    engine.step(0.1, withhold=torch.tensor(True))
    for key, tensor in held(engine, place).items():
        if key.endswith("|ema"):
            torch.testing.assert_close(
                tensor, mine[key.replace("|ema", "|param")].float(), rtol=1e-5, atol=1e-6
            )
            assert not torch.equal(tensor, now[key.replace("|ema", "|param")])


@pytest.mark.parametrize(
    "place",
    [Place(0, 2, "bf16", optimizer="adamw.ema"), Place(2, 2, optimizer="sgd.ema")],
    ids=str,
)
def test_an_average_is_the_one_kept_by_hand(host: RankHost, place: Place) -> None:
    host.run(average_by_hand, place.ranks, place)


def begin_an_average(ranks: Ranks, storage: str, source: Place, place: Place) -> None:
    run, engine = Run.open(storage, str(source)), build(place, ranks, initial=False)
    with CheckpointReader(run, run.latest_checkpoint()) as reader:
        engine.restore(reader, reader.metadata["optimizer_step"], reader.metadata["loss_scale"])
    found = held(engine, place)
    for key, tensor in found.items():
        if key.endswith("|ema"):
            assert torch.equal(tensor, found[key.replace("|ema", "|param")])


def test_an_average_that_a_checkpoint_has_not_begins_with_its_weights(
    host: RankHost, tmp_path: Path
) -> None:
    source = Place(1, 2)
    follow(host, tmp_path, [source], [])
    for place in (Place(0, 1, optimizer="adamw.ema"), Place(3, 2, optimizer="adamw.ema")):
        host.run(begin_an_average, place.ranks, str(tmp_path), source, place)


def withhold_one(ranks: Ranks, place: Place) -> list[bool]:
    """Train a step, have the next one withheld, and one whose gradients are not finite; then train
    on."""
    engine = build(place, ranks, initial=True)
    train_step(engine, ranks, 1)
    before, applied = held(engine, place), []
    for bad_loss, bad_gradient in ((True, False), (False, True)):
        ids = torch.arange(ROW_TOKENS)[None] + ranks.rank
        loss = engine(ids=ids).float().sum() * (float("nan") if bad_gradient else 1e-6)
        engine.backward(loss, last=True)
        update = engine.step(1e-3, withhold=torch.tensor(bad_loss))
        applied.append(bool(update.applied))
        after = held(engine, place)
        check_equal(
            {k: v for k, v in after.items() if "buffer" not in k},
            {k: v for k, v in before.items() if "buffer" not in k},
            f"{place}: withheld",
        )
        assert engine.num_updates == 1
    train_step(engine, ranks, 2)
    assert not torch.equal(held(engine, place)["up.weight|param"], before["up.weight|param"])
    return [*applied, engine.num_updates == 2]


@pytest.mark.parametrize(
    "place",
    [
        Place(0, 2),
        Place(0, 2, "bf16"),
        Place(1, 2),
        Place(2, 2, "bf16"),
        Place(3, 2),
        Place(1, 2, "fp32", "optimizer"),
        Place(1, 2, optimizer="sgd"),
        Place(2, 2, optimizer="lion.ema"),
        Place(0, 2, optimizer="adafactor"),
        Place(0, 2, "bf16", optimizer="muon.ema"),
    ],
    ids=str,
)
def test_an_update_that_is_withheld_changes_nothing(host: RankHost, place: Place) -> None:
    assert host.run(withhold_one, place.ranks, place) == [[False, False, True]] * 2


def save_wide(ranks: Ranks, storage: str, place: Place) -> None:
    save(
        build(place, ranks, initial=True, kind=Wide), ranks, place, Run.open(storage, str(place)), 0
    )


def restore_wide(ranks: Ranks, storage: str, source: Place, place: Place) -> tuple[int, int]:
    """Verify and restore as the training loop does. Returns the bytes read, and those of memory
    needed for it."""
    from dray.storage.filesystem import RangeReader

    num_bytes, read_at = 0, RangeReader.read_at

    def counted(self: RangeReader, wanted: int, offset: int) -> bytes:
        nonlocal num_bytes
        content = read_at(self, wanted, offset)
        num_bytes += len(content)
        return content

    RangeReader.read_at = counted  # type: ignore[method-assign]
    engine, run = build(place, ranks, initial=False, kind=Wide), Run.open(storage, str(source))
    for fragment in engine.fragments():
        fragment.view.detach().fill_(1.0)  # zeros that nobody wrote to take no memory
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew
    before = memory("VmHWM")
    with CheckpointReader(run, run.latest_checkpoint()) as reader:
        assert reader.verify_files(range(ranks.rank, reader.num_files, ranks.num_ranks)) == []
        engine.restore(reader, 0, {})
    return num_bytes, memory("VmHWM") - before


def memory(field: str) -> int:
    """Bytes of this process' memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is Linux's to tell"
)
def test_a_restore_takes_a_share_of_the_bytes_and_less_of_the_memory(
    host: RankHost, tmp_path: Path
) -> None:
    source = Place(1, 3)
    run = create_run(
        str(tmp_path), str(source), make_place(source)[0], {"num_steps": 9, "num_ranks": 3}
    )
    run.begin_attempt(num_ranks=3, start_step=0)
    host.run(save_wide, 3, str(tmp_path), source)
    with CheckpointReader(run, run.latest_checkpoint()) as reader:
        files = [file.num_bytes for file in reader.manifest.files]
    for place in (Place(1, 3), Place(3, 3), Place(2, 2)):
        found = host.run(restore_wide, place.ranks, str(tmp_path), source, place)
        for rank, (num_bytes, num_memory) in enumerate(found):
            # Once to verify its files, once to use its share, and the headers that say what lies
            # where.
            share = (
                sum(files[rank :: place.ranks])
                + sum(files) // place.ranks
                + len(files) * HEADER_BYTES
            )
            assert share * 0.95 < num_bytes <= share
            whole_weights = (
                0 if place.stage == 3 else sum(files) // 3
            )  # below ZeRO-3 the ranks exchange those
            assert num_memory < whole_weights + 3 * CHUNK_BYTES, place
