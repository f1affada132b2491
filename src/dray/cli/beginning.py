"""Commands that begin something: a spec, a plan, a corpus, a run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dray.cli.feedback import continue_command
from dray.errors import DrayError, PlanError, RunFailed, SpecError, StoreError

if TYPE_CHECKING:
    from dray.cluster.survey import Survey
    from dray.plan import Cost, Demands, Plan, Prices, Shape
    from dray.spec import Spec


def init_command(arguments: argparse.Namespace) -> int:
    import re

    from dray.spec import NAME_RULE, RUN_NAME, load_text

    if not re.fullmatch(RUN_NAME, arguments.name):
        raise SpecError(repr(arguments.name)[:200], "not a name", NAME_RULE)
    text = load_text(arguments.recipe)
    path = Path(f"{arguments.name}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(re.sub(r"(?m)^name:.*$", f"name: {arguments.name}", text, count=1))
    except FileExistsError as error:
        raise SpecError(
            str(path), "exists already", "nothing is overwritten", "choose another name"
        ) from error
    except OSError as error:
        raise StoreError(str(path), f"cannot be written ({error.strerror})") from error
    arguments.out.say(f"{path} written; edit it, then: dray plan {path}")
    return 0


def plan_command(arguments: argparse.Namespace) -> int:
    from dray.models.counting import make_counted_plan
    from dray.plan import (
        format_plan,
        format_stages,
        load_prices,
        make_stages,
        with_measured_step,
    )
    from dray.rank.rehearsal import find_rehearsal, rehearse
    from dray.spec import load_spec, load_tree
    from dray.sweep.space import split_overrides

    of_spec, of_space = split_overrides(arguments.overrides)
    _check_plan_options(arguments, of_space)
    spec = load_spec(arguments.spec, of_spec)
    prices = load_prices(arguments.prices) if arguments.instance else None
    shape, survey = _find_shape(arguments, spec, prices)
    spec, config = _find_run_inputs(spec, arguments.storage)
    plan = _plan_known_corpus(spec, shape, arguments.storage, config) or make_counted_plan(
        spec, shape, config=config
    )
    is_here = not (arguments.shape or arguments.instance or arguments.address)
    measured = find_rehearsal(spec, plan, config) if is_here else None
    if arguments.measure and measured is None:
        spec.optimizer.check_package()
        measured = rehearse(spec, plan, config)
    if measured is not None:
        plan = with_measured_step(plan, measured.step_seconds(plan.batch.accumulation))
    demands = _find_demands(spec, plan, arguments.storage)
    cost = _find_cost(arguments, plan, demands, prices)
    bill = None
    if arguments.space:
        from dray.sweep.bill import make_bill
        from dray.sweep.space import check_space, load_space

        space = load_space(arguments.space, of_space)
        check_space(space, load_tree(arguments.spec, of_spec), arguments.space)
        bill = make_bill(space, plan, demands, cost)
    if arguments.json:
        others = {"demands": demands, "cost": cost, "cluster": survey, "sweep": bill}
        arguments.out.say_json(
            {
                **plan.model_dump(mode="json"),
                **{key: item and item.model_dump(mode="json") for key, item in others.items()},
                "stages": [stage.model_dump(mode="json") for stage in make_stages(spec, plan)],
            }
        )
        return 0
    arguments.out.say(format_plan(plan, demands, cost))
    if len(stages := make_stages(spec, plan)) > len(("prepare", "train")):
        arguments.out.say(f"\n{format_stages(stages)}")
    for title, found in (("cluster", survey), ("sweep", bill)):
        if found is not None:
            arguments.out.say("\n".join(["", title, *(f"  {line}" for line in found.describe())]))
    return 0


def _check_plan_options(arguments: argparse.Namespace, of_space: Sequence[str]) -> None:
    """Raise PlanError or SpecError for options that contradict each other."""
    elsewhere = [
        f"--{name} {value}"
        for name in ("shape", "address", "instance")
        if (value := getattr(arguments, name))
    ]
    if arguments.measure and elsewhere:
        raise PlanError(
            "--measure",
            f"{elsewhere[0]} is not this machine",
            "only what is here can be measured",
            "leave one of them out",
        )
    if arguments.shape and arguments.address:
        raise PlanError(
            f"--shape {arguments.shape}",
            f"--address {arguments.address} has a shape of its own",
            "a plan is for one of them",
            "leave one of them out",
        )
    if arguments.instance and arguments.price_per_hour is not None:
        raise SpecError(
            f"--price {arguments.price_per_hour:g}",
            f"--instance {arguments.instance} has a price of its own",
            "one of them says what an hour costs",
            "leave one of them out, or name a table of your own with --prices",
        )
    if arguments.prices and not arguments.instance:
        raise SpecError(
            f"--prices {arguments.prices}", "prices nothing", "--instance says what is taken of it"
        )
    if of_space and not arguments.space:
        raise SpecError(f"space.{of_space[0]}", "there is no space", "--space names one")


def _find_shape(
    arguments: argparse.Namespace, spec: Spec, prices: Prices | None
) -> tuple[Shape, Survey | None]:
    """What the plan is for; of a cluster with what it has for the spec's workers. `prices`: of
    instances, where one is named."""
    from dray.plan import (
        check_accelerator,
        find_instance,
        local_shape,
        make_shape,
        parse_shape,
    )

    if arguments.shape or not arguments.address:
        if arguments.shape:
            shape = parse_shape(arguments.shape)
        elif prices is not None:
            found = find_instance(prices, arguments.instance)
            shape = make_shape(arguments.instance, found, spec.resources)
        else:
            shape = local_shape()
        check_accelerator(spec.resources.accelerator, shape)
        return shape, None
    from dray.cluster.connection import connect
    from dray.cluster.needs import make_worker_needs
    from dray.cluster.survey import survey_cluster

    resources = spec.resources
    with connect(
        arguments.address,
        num_cpus=0,
        worker=make_worker_needs(resources),
        num_workers=resources.max_workers,
    ) as connection:
        return connection.shape, survey_cluster(resources)


def _find_demands(spec: Spec, plan: Plan, storage: str) -> Demands:
    """What the run takes of that storage, with what is free there, or the requests to it."""
    from dray.plan import free_disk_bytes, make_demands

    place = storage.removeprefix("file://")
    is_uri = "://" in place
    demands = make_demands(spec, plan, with_requests=is_uri)
    free = None if is_uri else free_disk_bytes(place)
    return demands.model_copy(update={"free_bytes": free})


def _find_cost(
    arguments: argparse.Namespace, plan: Plan, demands: Demands, prices: Prices | None
) -> Cost | None:
    """What the run costs, where an hour has a price."""
    from dray.plan import check_instance, find_instance, price_instances, price_workers

    seconds = demands.seconds_with_failures or plan.est_seconds
    if prices is not None:
        instance = find_instance(prices, arguments.instance)
        check_instance(arguments.instance, instance, plan.shape)
        return price_instances(prices, arguments.instance, plan.shape.num_nodes, seconds)
    if arguments.price_per_hour is not None:
        return price_workers(arguments.price_per_hour, plan.num_ranks, seconds)
    return None


def _find_run_inputs(spec: Spec, storage: str) -> tuple[Spec, Mapping[str, Any] | None]:
    """The spec with the folder of the tokeniser that is another run's, and the configuration of the
    other run that its model starts from; None where it starts from none. Raises UserError for runs
    that the spec names and that cannot be what they are named for."""
    config = None
    if spec.distil is not None:
        from dray.origin import find_teacher

        find_teacher(storage, spec.distil.run)
    if spec.augmentation is not None:
        from dray.corpus.translating import find_origins

        find_origins(spec, storage)
    if spec.model.run:
        from dray.origin import find_run_weights

        config = find_run_weights(storage, spec.model.run, spec.model.step).config()
    if spec.tokenizer.run:
        from dray.corpus.prepare import with_tokenizer_folder

        spec = with_tokenizer_folder(spec, storage)
    return spec, config


def _plan_known_corpus(
    spec: Spec, shape: Shape, storage: str, config: Mapping[str, Any] | None
) -> Plan | None:
    """With the counts of the corpus, if steps or times go by them, and it is prepared in a local
    storage and its inputs are at hand."""
    if (spec.task.packs and spec.duration.epochs is None) or not Path(storage, "corpora").is_dir():
        return None
    from dray.corpus.prepare import recall
    from dray.rank.job import make_corpus_plan

    corpus = None
    with suppress(DrayError):  # of the inputs: a plan is made without them, too
        corpus = recall(spec, storage)
    return None if corpus is None else make_corpus_plan(spec, shape, corpus.manifest, config=config)


def prepare_command(arguments: argparse.Namespace) -> int:
    from dray.cluster.connection import connect
    from dray.corpus.prepare import check_inputs, prepare
    from dray.processes.imports import require_package
    from dray.runs import check_storage
    from dray.show.corpus_page import make_corpus_page
    from dray.show.html import write_page
    from dray.show.progress import Display
    from dray.spec import load_spec

    spec = load_spec(arguments.spec, arguments.overrides)
    check_storage(arguments.storage)
    if arguments.html:
        require_package("matplotlib", "report", "--html")
    check_inputs(spec, arguments.storage)
    with connect(arguments.address, num_cpus=1, verbose=arguments.verbose):
        display = Display()
        corpus = prepare(spec, arguments.storage, display.say)
    if arguments.html:
        write_page(make_corpus_page(corpus), arguments.html)
        display.say(f"{arguments.html} written: open it in a browser")
    for line in corpus.describe():
        display.say(line)
    if arguments.json:
        files = [file.model_dump(mode="json") for file in corpus.source_files()]
        arguments.out.say_json(
            {
                "folder": corpus.folder,
                **corpus.manifest.model_dump(mode="json"),
                "source_files": files,
            }
        )
    else:
        manifest = corpus.manifest
        arguments.out.say(
            f"{corpus.folder}: {manifest.train.num_rows:,} rows of {manifest.sequence_tokens} "
            "tokens"
        )
    return 0


def train_command(arguments: argparse.Namespace) -> int:
    from dray.show.report import format_summary
    from dray.spec import load_tree, make_spec
    from dray.train.driver import train

    if arguments.continued is not None:
        return continue_command(arguments)
    if arguments.spec is None:
        raise SpecError("dray train", "names no spec", "", "give SPEC, or --continue RUN")
    for option in ("data", "held", "max_drop", "promote"):
        if getattr(arguments, option):
            word = option.replace("_", "-")
            raise SpecError(f"--{word}", "goes with --continue RUN", "a spec has its own data")
    tree = load_tree(arguments.spec, arguments.overrides)
    if arguments.from_trial:
        tree = _with_trial(tree, arguments.from_trial, arguments.storage)
    spec = make_spec(tree, arguments.spec, arguments.overrides)
    ended = train(
        spec,
        storage=arguments.storage,
        run_name=arguments.run_name,
        fork=arguments.fork,
        address=arguments.address,
        verbose=arguments.verbose,
    )
    if arguments.json:
        arguments.out.say_json(ended.run.summary())
    else:
        arguments.out.say(format_summary(ended.run))
    return 0


def _with_trial(tree: Mapping[str, Any], trial: str, storage: str) -> dict[str, Any]:
    """A spec's values with those that a trial of a sweep had."""
    from dray.cli.looking import split_place
    from dray.sweep.record import Sweep
    from dray.sweep.space import with_values
    from dray.sweep.summary import find_trial

    place, name = split_place(trial, storage)
    sweep, slash, which = name.rpartition("/")
    if not slash:
        raise StoreError(
            f"--from-trial {trial}", "names no trial", "a trial is SWEEP/0007 or SWEEP/best"
        )
    return with_values(tree, find_trial(Sweep.open(place, sweep), which).parameters)


def release_command(arguments: argparse.Namespace) -> int:
    from dray.pipeline.release import Released, release
    from dray.show.progress import Display
    from dray.show.stages import format_stages_done
    from dray.spec import load_spec

    spec = load_spec(arguments.spec, arguments.overrides)

    def report(released: Released) -> None:
        if arguments.json:
            arguments.out.say_json(asdict(released))
        else:
            arguments.out.say(format_stages_done(released.stages, released.missed))

    released = release(
        spec,
        storage=arguments.storage,
        run_name=arguments.run_name,
        until=arguments.until,
        address=arguments.address,
        verbose=arguments.verbose,
        say=Display().say,
        report=report,
    )
    return RunFailed.exit_code if released.missed else 0


def tune_command(arguments: argparse.Namespace) -> int:
    from dray.cli.looking import say_sweep
    from dray.spec import load_tree
    from dray.sweep.driver import tune
    from dray.sweep.space import load_space, split_overrides

    of_spec, of_space = split_overrides(arguments.overrides)
    space = load_space(arguments.space, of_space)
    sweep = tune(
        load_tree(arguments.spec, of_spec),
        space,
        storage=arguments.storage,
        name=arguments.run_name,
        space_name=arguments.space,
        address=arguments.address,
        verbose=arguments.verbose,
    )
    say_sweep(sweep, arguments)
    return 0


def ladder_command(arguments: argparse.Namespace) -> int:
    from dray.cli.looking import say_sweep
    from dray.ladder.driver import climb, parse_amount
    from dray.spec import load_tree

    sweep = climb(
        load_tree(arguments.spec, arguments.overrides),
        budget=parse_amount(arguments.budget, "--budget"),
        wanted=None if arguments.wanted is None else parse_amount(arguments.wanted, "--for"),
        price_per_hour=arguments.price_per_hour,
        storage=arguments.storage,
        name=arguments.run_name,
        address=arguments.address,
        verbose=arguments.verbose,
    )
    say_sweep(sweep, arguments)
    return 0
