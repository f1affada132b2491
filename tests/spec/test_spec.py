"""The spec: loading, overrides, identity and place, and one clear line for each kind of mistake."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from dray.errors import SpecError
from dray.spec import (
    MAX_SPEC_BYTES,
    OPTIMIZERS,
    Source,
    Spec,
    differing_paths,
    dump_spec,
    load_spec,
    make_spec,
    read_yaml,
    recipe_names,
)
from tiny import tiny_tree

TREE = {
    "name": "speeches",
    "task": "causal_lm",
    "data": {
        "train": ["../shared/data/corpus_en/*.jsonl.gz"],
        "validation": {"share": 0.02},
        "sequence_tokens": 512,
    },
    "tokenizer": {"train": "byte_bpe", "vocab_size": 8192},
    "model": {"architecture": "llama", "hidden_size": 384, "num_layers": 6, "num_heads": 6},
    "batch": {"global_rows": 16, "micro_rows": "auto"},
    "optimizer": {"name": "adamw", "learning_rate": 1.0e-3, "weight_decay": 0.1},
    "schedule": {"name": "cosine", "warmup_steps": 10},
    "regularization": {"dropout": 0.0, "label_smoothing": 0.0, "clip_grad_norm": 1.0},
    "duration": {"steps": 50},
    "precision": "bf16",
    "validation": {"every_steps": 25},
    "checkpoint": {"every_steps": 25, "keep_last": 2},
    "resources": {"workers": 2, "cpus_per_worker": 1, "gpus_per_worker": 0},
    "zero": {"stage": "auto", "offload": "none"},
    "seed": 0,
}


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "speeches.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def test_the_contract_example_loads_and_survives_a_round_trip(spec_file: Path):
    spec = load_spec(spec_file)
    assert spec.batch.global_rows == 16
    assert make_spec(yaml.safe_load(dump_spec(spec))) == spec
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "section", "value"),
    [
        ("batch.global_rows=64", "batch.global_rows", 64),
        ("resources.workers=[2,8]", "resources.workers", (2, 8)),
        ("zero.stage=3", "zero.stage", 3),
        ("optimizer.learning_rate=6e-4", "optimizer.learning_rate", 6e-4),  # PyYAML reads a string
        ("duration.epochs=2", "duration.steps", None),  # replaces its alternative
        ("data.train=x.txt", "data.train", (Source(path="x.txt"),)),
        ("data.train=[a.txt, {path: b.txt, weight: 2}]", "data.train", None),
        ("regularization.clip_grad_norm=null", "regularization.clip_grad_norm", None),
    ],
)
def test_overrides_reach_dotted_paths(spec_file: Path, override: str, section: str, value: object):
    if "weight" in override:
        with pytest.raises(SpecError, match="give every source a weight, or none"):
            load_spec(spec_file, [override])
        return
    found: object = load_spec(spec_file, [override])
    for part in section.split("."):
        found = getattr(found, part)
    assert found == value


def test_overrides_reach_the_items_of_a_list(spec_file: Path):
    spec = load_spec(
        spec_file,
        ["data.train=[a, {path: b}, c]", "data.train.1.format=csv", "data.train.2.format=csv"],
    )
    found = [(source.path, source.format) for source in spec.data.train]
    assert found == [("a", "auto"), ("b", "csv"), ("c", "csv")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.globl_rows=3", "unknown key batch.globl_rows; did you mean batch.global_rows?"),
        ("data.trian=3", "unknown key data.trian; did you mean data.train?"),
        ("data.train={pth: 3}", "unknown key data.train.0.pth; did you mean data.train.path?"),
        ("data.train=[a.txt] data.train.1.path=b.txt", "the list has no item 1; .* from 0: 0 to 0"),
        ("data.train=[a.txt] data.train.path=b.txt", "the list has no item path"),
        (
            "data.train={path: a.txt} data.train.0.path=b.txt",
            "the command line: data.train is no list, .* without a number: data.train.KEY",
        ),
        ("foo=1", "unknown key foo; known here: name, task"),
        (
            "batch.global_rows=0",
            "batch.global_rows = 0: a number above 0, or auto, is wanted",
        ),
        ("batch.global_rows=many", "batch.global_rows = 'many': input should be a valid integer"),
        (
            "resources.workers=yes",
            "resources.workers = True: a number is wanted, not true or false",
        ),
        (
            "resources.labels={zone: 1}",
            'resources.labels: zone: 1 is no word; put it in quotes: "1"',
        ),
        ("resources.labels={zone: yes}", 'zone: True is no word; put it in quotes: "true"'),
        ("resources.labels={zone: a b}", "zone: a b: names and values are up to 63 letters"),
        ("resources.labels={a/b/c: d}", "a/b/c: d: names and values are up to 63 letters"),
        (
            "resources={labels: {zone: b}, workers: [1, 2]}",
            r"labels beside workers \[1, 2\]: .* an elastic group .*; give workers=2, or labels={}",
        ),
        (
            "resources.accelerator=H100",
            "accelerator H100 beside gpus_per_worker 0: .*; give gpus_per_worker=1, or",
        ),
        ("resources.workers=[4,2]", "workers \\[4, 2\\]: the first must not exceed the second"),
        (
            "optimizer.learning_rate=-1",
            "optimizer.learning_rate = -1: a number above 0, or auto, is wanted",
        ),
        ("optimizer.learning_rate=.nan", "finite"),
        ("model.hidden_size=100", "hidden_size 100 is not a multiple of num_heads 6"),
        ("model.num_layers=null", "`num_layers` is needed"),
        ("zero.stage=7", "zero.stage = 7"),
        ("zero=3", "zero = 3: a mapping such as {stage: 3} is wanted"),
        ("duration=100", "duration = 100: a mapping such as {steps: 100} is wanted"),
        ("duration=[1]", r"duration = \[1\]: a mapping of steps, epochs, tokens is wanted"),
        ("task=[causal_lm]", "task = \\['causal_lm'\\]: the name of a task, or a mapping"),
        ("task=5", "task = 5: the name of a task"),
        ("task=true", "task = True: the name of a task"),
        ("task={name: [a]}", "task: name = \\['a'\\]: the name of a task is a word"),
        ("task.share=0.3", "task: causal_lm has no setting share; its settings: none"),
        (
            "task={name: masked_lm, share: 2}",
            "^the command line: task: share = 2: input should be less than 1",
        ),
        (
            "data.validation=null validation.patience=3",
            "validation.patience = 3: without data.validation there is nothing to validate on",
        ),
        (
            "task=regression data.train={path: x, label: y} regularization.label_smoothing=0.1",
            "label_smoothing = 0.1: regression has no classes to smooth",
        ),
        (
            "task=preference regularization.label_smoothing=0.1",
            "label_smoothing = 0.1: preference has no classes to smooth",
        ),
        ("zero={stage: 0, offload: optimizer}", "offload optimizer needs stage 1 or higher, not 0"),
        ("precision=int8", "precision = 'int8'"),
        (
            "optimizer={name: sgd, learning_rate: 1, beta2: 0.9}",
            "unknown key optimizer.beta2; known here: name, learning_rate, weight_decay, "
            "block_rate, momentum",
        ),
        ("optimizer.momentum=0.9", "unknown key optimizer.momentum; known here: name, learning"),
        ("optimizer={name: lion, learing_rate: 1}", "did you mean optimizer.learning_rate"),
        ("optimizer={name: lion}", "optimizer.learning_rate is missing"),
        (
            "optimizer.name=adam",
            "optimizer: its name is one of adamw, adamw_8bit, sgd, lion, adafactor, muon",
        ),
        ("optimizer=3", "optimizer = 3: its name is one of"),
        ("regularization.ema={decay: 1}", "regularization.ema.decay = 1: input should be less"),
        ("name=a/b", "^the command line: name = 'a/b': up to 100 letters, digits"),
        (
            "data.validation={share: 0.1, path: x}",
            "either a `share` of the training documents or the `path` of others",
        ),
        (
            "schedule={name: wsd, decay_steps: 51}",
            "the run has 50 steps, and the decay lies within it",
        ),
        ("name=../up", "name = '../up'"),
        ("task=sequence_classification", "needs a `label` column"),
        ("duration={steps: 5, epochs: 1}", "exactly one of `steps`, `epochs` and `tokens`"),
        ("schedule.warmup_steps=51", "before the warm-up"),
        ("tokenizer={}", "exactly one of `path`, `run` and `train`"),
        ("data.validation={share: 2}", "data.validation.share = 2: input should be less than 1"),
        ("batch.global_rows", "not an override; overrides read key.path=value"),
        ("Batch.rows=1", "not an override"),
        ("batch.global_rows=[1", "the value cannot be used \\(not YAML"),
        ("batch={global_rows: 1, global_rows: 2}", "the key global_rows stands twice, in line 1"),
        ("name=2026-13-45", "the value cannot be used"),
        ('data.train="a\\0b"', "holds a character that no file name can hold"),
        ("model=&a {options: *a}", "nested deeper"),
    ],
)
def test_a_mistake_is_one_line_that_says_where_and_what(
    spec_file: Path, override: str, message: str
):
    with pytest.raises(SpecError, match=message) as caught:
        load_spec(spec_file, re.split(r" (?=[a-z0-9._]+=)", override))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not YAML"),
        ("just words", "holds a str"),
        ("- a\n- b", "holds a list"),
        ("", "is empty"),
        ("# a comment alone", "is empty"),
        (
            "name: a\nseed: 1\ndata:\n  train: x\n  train: y",
            "the key train stands twice, in lines 4 and 5",
        ),
        ("name: a\n'name': b", "the key name stands twice, in lines 1 and 2"),
        ("name: a\n---\nname: b", "another document"),
        ("name: 2026-13-45", "month must be in 1..12"),
        ("seed: !!int ''", "not what its form says"),
        ("[" * 5000, "nested deeper than 50 levels"),
        ("a: &a {b: *a}", "nested deeper than 50 levels"),
        (
            "a0: &a0 x\n"
            + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)),
            "aliases",
        ),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("1: 2", "the key 1 is"),
        ("name: x", "data is missing"),
    ],
)
def test_a_file_that_is_no_spec_is_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        load_spec(path)


def test_a_missing_file_and_an_unknown_recipe_get_a_way_out(tmp_path: Path):
    with pytest.raises(SpecError, match="did you mean quickstart"):
        load_spec("quikstart")
    with pytest.raises(SpecError, match="no such file, and no recipe"):
        load_spec(tmp_path / "none.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="UTF-8"):
        load_spec(binary)


def test_what_is_no_text_file_is_refused(tmp_path: Path):
    huge = tmp_path / "huge.yaml"
    with huge.open("wb") as file:
        file.truncate(MAX_SPEC_BYTES + 1)
    with pytest.raises(SpecError, match="holds more than 4 MiB"):
        load_spec(huge)
    for name, message in (
        (str(tmp_path), "is a folder"),
        ("a" * 5000, "File name too long"),
        (f"{huge}/x", "no such file"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(SpecError, match=message) as caught:
            load_spec(name)
        assert len(str(caught.value)) < 400


def test_a_pipe_is_read_as_a_file_is():
    read_end, write_end = os.pipe()
    os.write(write_end, yaml.safe_dump(TREE).encode())
    os.close(write_end)
    assert load_spec(f"/dev/fd/{read_end}").name == "speeches"
    os.close(read_end)


def test_merged_keys_may_be_overridden():
    tree = read_yaml("base: &b {a: 1, c: 3}\none: &o\n  <<: *b\n  a: 2\ntwo:\n  <<: *o\n  c: 4")
    assert tree["two"] == {"a": 2, "c": 4}


def changed(**sections: dict[str, object]) -> Spec:
    return make_spec(
        {**TREE, **{name: {**TREE.get(name, {}), **values} for name, values in sections.items()}}
    )


@pytest.mark.parametrize(
    ("sections", "identical"),
    [
        ({"resources": {"workers": [1, 4]}}, True),
        ({"zero": {"stage": 3, "offload": "optimizer"}}, True),
        ({"batch": {"micro_rows": 2}}, True),
        ({"checkpoint": {"every_steps": 1}}, True),
        ({"validation": {"every_steps": 5}}, True),
        ({"engine": {"compile": True}}, True),
        ({"tracking": {"tensorboard": True}}, True),
        ({"batch": {"global_rows": 32}}, False),
        ({"model": {"hidden_size": 192}}, False),
        ({"optimizer": {"learning_rate": 2e-3}}, False),
        ({"regularization": {"dropout": 0.1}}, False),
        ({"duration": {"steps": 60}}, False),  # a cosine without decay_steps depends on its end
    ],
)
def test_the_fingerprint_covers_identity_alone(
    sections: dict[str, dict[str, object]], identical: bool
):
    assert (changed(**sections).fingerprint() == make_spec(TREE).fingerprint()) is identical


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "constant"},
        {"name": "wsd"},
        {"decay_steps": 100},
        {"name": "linear", "decay_steps": 80},
    ],
)
def test_a_duration_may_be_extended_where_the_rate_does_not_depend_on_it(
    schedule: dict[str, object],
):
    short, long = changed(schedule=schedule), changed(schedule=schedule, duration={"steps": 500})
    assert short.fingerprint() == long.fingerprint()


def test_differing_paths_are_named():
    a, b = (
        make_spec(TREE).identity(),
        changed(model={"num_layers": 2}, optimizer={"beta2": 0.99}).identity(),
    )
    assert differing_paths(a, b) == ["model.num_layers", "optimizer.beta2"]


def test_what_was_a_spec_before_there_were_other_optimizers_keeps_its_fingerprint():
    assert (
        make_spec(TREE).fingerprint()
        == "1887183a587ee43f22d2214eec09d5f7f7fb71e756a63606de9d5e4686ffdf5c"
    )
    assert changed(regularization={"ema": {}}).fingerprint() != make_spec(TREE).fingerprint()


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_each_optimizer_survives_a_round_trip(name: str):
    tree = {**TREE, "optimizer": {"name": name, "learning_rate": 0.5}}
    spec = make_spec(tree)
    assert type(spec.optimizer) is OPTIMIZERS[name]
    assert make_spec(yaml.safe_load(dump_spec(spec))) == spec
    assert make_spec(spec.model_dump(mode="json")).fingerprint() == spec.fingerprint()


@pytest.mark.parametrize("name", ["adafactor", "muon", "adamw_8bit"])
@pytest.mark.parametrize(
    ("zero", "key"), [({"stage": 2}, "stage = 2"), ({"offload": "optimizer"}, "offload = optim")]
)
def test_what_needs_whole_matrices_is_refused_where_zero_cuts_them(
    name: str, zero: dict[str, object], key: str
):
    tree = {**TREE, "optimizer": {"name": name, "learning_rate": 0.5}, "zero": zero}
    with pytest.raises(
        SpecError, match=rf"zero\.{key}.*{name} goes by .*whole.*give zero\.stage=0"
    ):
        make_spec(tree)
    assert make_spec({**tree, "zero": {"stage": 0}}).zero.stage == 0


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads(name: str):
    assert load_spec(name).name == name


def test_every_label_that_is_taken_is_one_to_ray():
    """Its own check lies in a module that imports Ray, which a spec must not."""
    rays = pytest.importorskip("ray._private.label_utils")
    taken = []
    for name in ("zone", "ray.io/market-type", "a.b-c/d_e", "-a", "a/b/c", "x" * 64, "a b", "ä"):
        for value in ("b", "!b", "in(a, b)", "!in(a,b)", "in()", "!!b", "", "not(b)", "x" * 64):
            try:
                labels = make_spec(
                    {**TREE, "resources": {"labels": {name: value}}}
                ).resources.labels
            except SpecError:
                continue
            assert rays.validate_label_selector(labels) is None
            assert labels == {name: value.replace(" ", "")}
            taken.append(labels)
    assert len(taken) == 3 * 4


def test_a_card_and_labels_are_place_and_stand_in_a_spec_only_where_they_are_given(spec_file: Path):
    plain = load_spec(spec_file)
    placed = load_spec(
        spec_file,
        ["resources={workers: 2, gpus_per_worker: 1, accelerator: H100, labels: {zone: b}}"],
    )
    assert plain.fingerprint() == placed.fingerprint()
    assert make_spec(yaml.safe_load(dump_spec(placed))) == placed
    assert not {"accelerator", "labels"} & set(yaml.safe_load(dump_spec(plain))["resources"])
    bare = load_spec(spec_file, ["resources.labels=null", "resources.accelerator=null"])
    assert bare == plain


def test_a_number_is_a_word_where_columns_and_labels_may_be_numbers() -> None:
    tree = tiny_tree(Path("."), task="sequence_classification")
    columns = {"text": 0, "label": -1, "columns": {"label": 2}}
    tree["data"]["train"] = {"path": "x.tsv", "header": False, **columns}
    (source,) = make_spec(tree).data.train
    assert (source.text, source.label, source.columns) == ("0", "-1", {"label": "2"})
    with pytest.raises(SpecError, match="valid string"):
        make_spec({**tree, "data": {**tree["data"], "train": {"path": "x", "text": True}}})
