"""Counts of the architecture itself: equal to the formulas where there are any, to what torch
multiplies, and found by a process of its own that is asked once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dray.errors import SpecError
from dray.models.config import make_config
from dray.models.counting import count_model, find_counts, make_counted_plan
from dray.plan import Counted, count_parameters, load_dimensions, make_plan, parse_shape
from dray.plan.architectures import _HARMLESS_OPTIONS, HEEDED_OPTIONS
from dray.plan.flops import flops_per_token_loose, flops_per_token_strict
from dray.plan.parameters import FAMILIES
from dray.spec import Spec, make_spec
from small_models import small_model
from tiny import source_for

HEADS = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
}
LAPTOP = parse_shape("1xCPU(cpus=4,memory=16GB)")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dray" / "counts"


def tree_of(
    architecture: str | None, task: str = "causal_lm", *, row_tokens: int = 96, **model: Any
) -> dict[str, Any]:
    sizes = {"hidden_size": 64, "num_layers": 3, "num_heads": 4}
    return {
        "name": "t",
        "task": task,
        "data": {"train": source_for(task), "sequence_tokens": row_tokens},
        "tokenizer": {"train": "byte_bpe", "vocab_size": 512},
        "model": ({"architecture": architecture} | sizes if architecture else {}) | model,
        "duration": {"steps": 1},
    }


def spec_of(architecture: str | None, task: str = "causal_lm", **settings: Any) -> Spec:
    return make_spec(tree_of(architecture, task, **settings))


def counted(spec: Spec, **known: Any) -> Counted:
    """Counted although a formula is exact: its exactness is what is to be shown."""
    sizes = load_dimensions(spec, **known)
    return count_model(spec, vocab_size=sizes.vocab, num_labels=sizes.num_labels, pad_token_id=1)


def serves(architecture: str, task: str) -> bool:
    import transformers

    names = getattr(transformers, HEADS[task])._model_mapping._model_mapping
    return architecture in names


KNOWN = [
    (architecture, task)
    for architecture in FAMILIES
    for task in HEADS
    if serves(architecture, task)
]


def assert_formula_is_exact(spec: Spec) -> None:
    by_formula = load_dimensions(spec)
    assert by_formula.exact
    found = counted(spec)
    assert found.count == count_parameters(by_formula)
    assert found.sizes(by_formula) == by_formula
    for tokens in (96, 8192):
        for flops in (flops_per_token_loose, flops_per_token_strict):
            assert flops(by_formula, found.count, tokens) == flops(
                by_formula, count_parameters(by_formula), tokens
            )


@pytest.mark.parametrize(("architecture", "task"), KNOWN)
def test_formulas_are_what_the_architecture_is(architecture: str, task: str) -> None:
    assert_formula_is_exact(spec_of(architecture, task))


OTHER_VALUES: dict[str, Any] = {
    "head_dim": 32,
    "attention_bias": None,
    "mlp_bias": True,
    "sliding_window": 48,
    "multi_query": False,
    "use_bias": False,
    "type_vocab_size": 3,
    "local_attention": 32,
}


@pytest.mark.parametrize(
    ("architecture", "option"),
    [
        (architecture, option)
        for architecture, names in HEEDED_OPTIONS.items()
        for option in names
        if option not in _HARMLESS_OPTIONS and architecture != "vit"
    ],
)
def test_formulas_heed_these_options(architecture: str, option: str) -> None:
    value = OTHER_VALUES[option]
    if value is None:
        value = architecture == "llama"  # the other way than by default
    task = "causal_lm" if serves(architecture, "causal_lm") else "masked_lm"
    assert_formula_is_exact(spec_of(architecture, task, options={option: value}))


def test_an_option_that_no_formula_heeds_is_counted() -> None:
    spec = spec_of("modernbert", "masked_lm", options={"attention_bias": True})
    assert not load_dimensions(spec).exact
    found = find_counts(spec)
    assert isinstance(found, Counted)
    plain = count_parameters(load_dimensions(spec_of("modernbert", "masked_lm")))
    assert found.count.total == plain.total + 3 * (3 * 64 + 64)  # queries, keys, values; output


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"freezing": {"blocks": 9}}, r"freezing\.blocks = 9: the model has 3"),
        ({"adapters": {"name": "lora", "targets": ["nowhere"]}}, r"adapters\.targets"),
    ],
)
def test_a_part_that_the_model_does_not_have_is_a_mistake_and_no_estimate(
    sections: dict[str, Any], said: str
) -> None:
    spec = spec_of("llama").model_dump(mode="json") | sections
    for _ in range(2):  # counted, and remembered
        with pytest.raises(SpecError, match=said):
            make_counted_plan(make_spec(spec), LAPTOP)


def test_what_a_formula_knows_is_not_counted(cache: Path) -> None:
    assert find_counts(spec_of("llama")) == ""
    assert not cache.exists()


def test_an_unknown_architecture_is_planned_as_it_is() -> None:
    spec = spec_of("olmo")
    plan = make_counted_plan(spec, LAPTOP)
    model = small_model(spec, vocab_size=512)
    assert plan.num_parameters == sum(p.numel() for p in model.parameters())
    assert plan.parameters_exact
    assert not any("formula" in note for note in plan.notes)
    by_formula = make_plan(spec, LAPTOP)
    assert any("olmo is counted by formula" in note for note in by_formula.notes)
    assert not by_formula.parameters_exact


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "granitemoe"])
def test_of_a_mixture_a_token_goes_through_the_experts_that_it_is_sent_to(
    architecture: str,
) -> None:
    few = "num_experts" if architecture == "qwen3_moe" else "num_local_experts"
    counts = []
    for number in (4, 8):
        options: dict[str, Any] = {few: number, "num_experts_per_tok": 2}
        if architecture == "qwen3_moe":
            options["moe_intermediate_size"] = 32
        found = find_counts(spec_of(architecture, options=options))
        assert isinstance(found, Counted)
        counts.append(found.count)
    four, eight = counts
    routers = 3 * 4 * 64  # a row of the router for each expert more, in three blocks
    assert eight.active - four.active == routers
    assert eight.body - four.body > 3 * 4 * 3 * 64 * 32
    assert four.body - four.active == (eight.body - eight.active) // 3  # 2 of 4 idle, 6 of 8


def test_shared_blocks_count_as_often_as_they_are_gone_through() -> None:
    three, six = (
        find_counts(spec_of("albert", "masked_lm", num_layers=layers)) for layers in (3, 6)
    )
    assert isinstance(three, Counted)
    assert isinstance(six, Counted)
    assert six.count.total == three.count.total
    assert six.count.layer == three.count.layer < three.count.body
    assert six.count.active - three.count.active == 3 * three.count.layer


def test_windows_and_directions_are_the_architectures_own() -> None:
    gemma = find_counts(spec_of("gemma2", options={"sliding_window": 32}))
    assert isinstance(gemma, Counted)
    assert sorted(gemma.attention) == [(1, 0), (2, 32)]
    assert gemma.causal
    electra = find_counts(spec_of("electra", "token_classification"))
    assert isinstance(electra, Counted)
    assert not electra.causal
    assert find_counts(spec_of("mamba")).attention == ()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("architecture", "task", "options"),
    [
        ("llama", "causal_lm", {}),
        ("gpt2", "causal_lm", {}),
        ("bert", "masked_lm", {}),
        ("modernbert", "token_classification", {}),
        ("albert", "masked_lm", {"embedding_size": 64}),
        ("mixtral", "causal_lm", {"num_local_experts": 4}),
        ("olmo2", "causal_lm", {}),
    ],
)
def test_flops_are_what_torch_counts(architecture: str, task: str, options: dict[str, Any]) -> None:
    """torch counts the products of a forward pass on a real model, whole squares of attention
    among them; biases and norms it does not. Of hidden tokens there are as many as a task hides."""
    rows, tokens = 4, 96
    spec = spec_of(architecture, task, options=options)
    model = small_model(spec)
    model.set_attn_implementation("eager")
    if architecture == "mixtral":
        model.set_experts_implementation("eager")
    ids = torch.randint(3, 512, (rows, tokens))
    num_hidden = round(spec.task.head.share * rows * tokens)
    hidden = {"attention_mask": torch.ones_like(ids), "labels": ids}
    hidden["places"] = torch.arange(num_hidden)
    objective = spec.task.objective(model).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if num_hidden < ids.numel():
            objective({"input_ids": ids, **hidden})
        else:
            model(input_ids=ids)
    found = counted(spec)
    sizes = found.sizes(load_dimensions(spec))
    strict = flops_per_token_strict(sizes, found.count, tokens)
    square = 12.0 * sizes.layers * sizes.heads * sizes.head_dim * tokens
    planned = strict + (square / 2 if sizes.causal else 0.0)
    # What transforms hidden tokens before the head is counted as a part of the body.
    within = 0.04 if task == "masked_lm" else 0.02
    assert planned == pytest.approx(3 * counter.get_total_flops() / ids.numel(), rel=within)


def test_a_folder_is_counted_as_it_is(tmp_path: Path) -> None:
    config = make_config(spec_of("qwen3"), vocab_size=600, pad_token_id=1, eos_token_id=0)
    config.save_pretrained(tmp_path / "model")
    tree = tree_of(None, path=str(tmp_path / "model"))
    tree["tokenizer"] = {"path": str(tmp_path)}
    spec = make_spec(tree)
    plan = make_counted_plan(spec, LAPTOP)
    model = small_model(spec_of("qwen3"), vocab_size=600)
    assert plan.counted is not None
    assert plan.counted.vocab == 600
    assert plan.num_parameters == sum(p.numel() for p in model.parameters())
    (tmp_path / "model" / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(SpecError, match=r"config\.json cannot be read"):
        make_counted_plan(spec, LAPTOP)


def test_a_model_that_cannot_be_built_is_estimated_and_says_why(cache: Path) -> None:
    spec = spec_of("olmo", options={"hidden_act": "gelly"})
    for _ in range(2):
        plan = make_counted_plan(spec, LAPTOP)
        (note,) = [note for note in plan.notes if "by formula" in note]
        assert "olmo cannot be built" in note
        assert "gelly" in note
        assert not plan.parameters_exact
    assert "gelly" in next(cache.iterdir()).read_text(encoding="utf-8")  # and is not tried again


def test_fewer_layers_are_about_so_much_less() -> None:
    found, less = (counted(spec_of("olmo", num_layers=layers)) for layers in (12, 4))
    assert found.with_layers(4).total == pytest.approx(less.count.total, rel=0.01)
    assert found.with_layers(4).body == pytest.approx(less.count.body, rel=0.01)


PLANS = (
    "import json, sys\n"
    "from dray.cli import main\n"
    "try: main(['plan', sys.argv[1], '--json'])\n"
    "except SystemExit: pass\n"
    "heavy = {'torch', 'ray', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)\n"
    "assert not heavy, heavy\n"
)


def plan_in_a_process(spec: Path, *options: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *options, "-c", PLANS, str(spec)],
        capture_output=True,
        text=True,
        check=False,
        cwd=spec.parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_plan_asks_a_process_once_and_imports_nothing_itself(cache: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(tree_of("olmo")), encoding="utf-8")
    first = plan_in_a_process(spec)
    real = counted(spec_of("olmo"))
    assert first["counted"] == real.model_dump(mode="json")
    (kept,) = cache.iterdir()
    assert kept.stat().st_mode & 0o077 == 0o044  # what is in it is no secret
    assert cache.stat().st_mode & 0o777 == 0o700
    # What is kept is what the next plan says.
    tree = json.loads(kept.read_text(encoding="utf-8"))
    tree["found"]["counted"]["count"]["total"] += 1
    kept.write_text(json.dumps(tree), encoding="utf-8")
    assert plan_in_a_process(spec)["num_parameters"] == first["num_parameters"] + 1
    # A file that is none is found out again.
    kept.write_text("{", encoding="utf-8")
    assert plan_in_a_process(spec)["num_parameters"] == first["num_parameters"]


def test_without_torch_a_plan_goes_by_formula_and_says_so(tmp_path: Path) -> None:
    """An installation of nothing but dray and what a spec needs."""
    import dray

    found = Path(pytest.__file__).parents[1]
    here = tmp_path / "packages"
    here.mkdir()
    wanted = ("pydantic*", "annotated_types*", "typing_*", "yaml", "_yaml", "rich*", "pygments*",
              "markdown_it*", "mdurl*", "pynvml*", "dray*.dist-info")  # fmt: skip
    for pattern in wanted:
        for path in found.glob(pattern):
            (here / path.name).symlink_to(path)
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(tree_of("olmo")), encoding="utf-8")
    source = str(Path(dray.__file__).parents[1])
    plan = plan_in_a_process(spec, "-S", PYTHONPATH=os.pathsep.join((source, str(here))))
    assert any("counted by formula (torch is not installed here)" in n for n in plan["notes"])
    assert plan["counted"] is None
