"""Commands that use a trained model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dray.cli.looking import locate, split_place
from dray.cli.together import (
    evaluate_together,
    give_records,
    is_together,
    judged_together,
    predict_together_command,
)
from dray.errors import SpecError
from dray.processes.imports import require_package

if TYPE_CHECKING:
    from dray.release.checks import Check
    from dray.release.judging.judge import Asked
    from dray.release.trained import Chosen


def _chosen(arguments: argparse.Namespace) -> Chosen:
    """The adapters that the command is to be done with."""
    from dray.release.trained import Chosen

    return Chosen(not arguments.no_adapters, tuple(arguments.adapter or ()))


def predict_command(arguments: argparse.Namespace) -> int:
    from dray.release.predict import Counts, predict
    from dray.show.progress import Display

    if is_together(arguments):
        return predict_together_command(arguments)
    storage, name = locate(arguments)
    counts = Counts()
    found = predict(
        storage,
        name,
        arguments.data,
        step=arguments.step,
        weights=arguments.weights,
        chosen=_chosen(arguments),
        counts=counts,
    )
    give_records(arguments, found)
    bad = f", {counts.num_bad:,} could not be read" if counts.num_bad else ""
    cut = f", {counts.num_cut:,} lost what a row has no place for" if counts.num_cut else ""
    short = (
        f", {counts.num_short:,} have too few records (gather.least)" if counts.num_short else ""
    )
    Display().say(f"{counts.num_predicted:,} records predicted{cut}{short}{bad}")
    return 0


def evaluate_command(arguments: argparse.Namespace) -> int:
    from dray.release.evaluate import measure_run

    if is_together(arguments):
        return evaluate_together(arguments)
    storage, name = locate(arguments)
    asked, checks = _asked(arguments)
    settings = {
        "data": arguments.data,
        "step": arguments.step,
        "weights": arguments.weights,
        "chosen": _chosen(arguments),
        "thorough": arguments.thorough,
        "workers": arguments.workers,
        "address": arguments.address,
        "verbose": arguments.verbose,
    }
    measured = measure_run(storage, name, **settings, by_row=asked is not None)
    result, report = measured.told(), measured.task.report(measured.metrics)
    more: dict[str, Any] = {}
    if asked is not None:
        from dray.release.judging.judge import judge, judge_against

        more["judgement"] = judge(measured, asked)
        if arguments.against:
            place, other = split_place(arguments.against, arguments.storage)
            settings |= {"chosen": type(settings["chosen"])()}
            second = measure_run(place, other, **settings, by_row=True)
            more["against"] = judge_against(measured, second, asked.num_draws)
    if checks:
        more["checks"] = _checked(arguments, storage, name, checks)
    if arguments.html:
        from dray.show.html import write_page
        from dray.show.judgement import make_judgement_page

        write_page(make_judgement_page(result, more, report), arguments.html)
    if arguments.json:
        arguments.out.say_json(result | more)
    else:
        _say_evaluation(arguments, result, more, report)
    return 0


def _asked(arguments: argparse.Namespace) -> tuple[Asked | None, list[tuple[int, Check]]]:
    """What is asked besides metrics: None for nothing that needs rows; and the checks. Raises
    UserError before a model is read."""
    checks: list[tuple[int, Check]] = []
    if arguments.checks:
        from dray.release.checks import read_checks

        checks = read_checks(arguments.checks, arguments.program)
    elif arguments.program:
        raise SpecError(
            "--program", "is of --checks, which is not given", way_out="give --checks FILE, too"
        )
    if arguments.html:
        require_package("matplotlib", "report", "a page")
    wants = (arguments.intervals is not None, arguments.slices, arguments.calibrate)
    if not any((*wants, arguments.against, arguments.html, arguments.texts)):
        return None, checks
    from dray.release.judging.judge import Asked

    asked = Asked(
        arguments.intervals,
        tuple(dict.fromkeys(arguments.slices or ())),
        arguments.calibrate,
        arguments.texts,
    )
    asked.check()
    return asked, checks


def _checked(
    arguments: argparse.Namespace, storage: str, name: str, checks: Sequence[tuple[int, Check]]
) -> dict[str, Any]:
    from dray.release.checks import run_checks, told_checks
    from dray.release.generate import generate
    from dray.show.progress import Display

    def write(prompts: Sequence[str]) -> list[str]:
        return generate(
            storage,
            name,
            prompts,
            step=arguments.step,
            weights=arguments.weights,
            chosen=_chosen(arguments),
            max_tokens=arguments.max_tokens,
            temperature=0.0,
            say=Display().say,
        )

    return told_checks(run_checks(checks, write, arguments.program))


def _say_evaluation(
    arguments: argparse.Namespace,
    result: Mapping[str, Any],
    more: Mapping[str, Any],
    report: Mapping[str, Mapping[str, float]],
) -> None:
    from dray.show.judgement import format_judgement

    shown = {
        key: f"{value:.6g}"
        if isinstance(value, float)
        else "undefined on these rows"
        if value is None
        else str(value)
        for key, value in result.items()
    }
    arguments.out.say("\n".join(f"{key:<20} {value}" for key, value in shown.items()))
    if report:
        arguments.out.say(_table(report))
    if more:
        arguments.out.say(format_judgement(more))
    if arguments.html:
        arguments.out.say(f"{arguments.html} written: open it in a browser")


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Rows of numbers by name, under the names of the columns."""
    columns = list(next(iter(rows.values())))
    lines = [f"{'':<20} " + " ".join(f"{column:>10}" for column in columns)]
    for name, values in rows.items():
        shown = (
            f"{value:>10.4f}" if isinstance(value, float) else f"{value:>10,}"
            for value in values.values()
        )
        lines.append(f"{name:<20} " + " ".join(shown))
    return "\n".join(lines)


def generate_command(arguments: argparse.Namespace) -> int:
    from dray.release.generate import generate
    from dray.show.progress import Display

    storage, name = locate(arguments)
    texts = generate(
        storage,
        name,
        arguments.prompt,
        step=arguments.step,
        weights=arguments.weights,
        chosen=_chosen(arguments),
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        beams=arguments.beams,
        say=Display().say,
    )
    if arguments.json:
        arguments.out.say_json(
            [{"prompt": p, "text": t} for p, t in zip(arguments.prompt, texts, strict=True)]
        )
        return 0
    for prompt, text in zip(arguments.prompt, texts, strict=True):
        arguments.out.say(f"── {prompt}\n{text}\n")
    return 0


def compress_command(arguments: argparse.Namespace) -> int:
    from functools import partial

    from dray.release.compress.compress import compress
    from dray.show.compression import format_compression
    from dray.show.progress import Display
    from dray.train.driver import train

    storage, name = locate(arguments)
    done = compress(
        storage,
        name,
        arguments.methods or (),
        new_name=arguments.new_name,
        step=arguments.step,
        weights=arguments.weights,
        data=arguments.data,
        max_drop=arguments.max_drop or (),
        train=partial(train, address=arguments.address, verbose=arguments.verbose),
        address=arguments.address,
        verbose=arguments.verbose,
        say=Display().say,
    )
    if arguments.json:
        arguments.out.say_json({"name": done.name, "kept": done.kept, **done.table})
    else:
        arguments.out.say(format_compression(done.table))
        kept = "is in the store" if done.kept else "was not kept: the gate does not hold"
        arguments.out.say(f"{done.name} {kept}")
    return 0 if done.kept else 3


def soup_command(arguments: argparse.Namespace) -> int:
    from dray.release.soup import Ingredient, soup
    from dray.show.compression import format_soup
    from dray.show.judgement import format_together
    from dray.show.progress import Display
    from dray.sweep.record import Sweep
    from dray.sweep.summary import best_trials

    ingredients = [Ingredient.read(words) for words in arguments.models]
    if arguments.sweep is not None:
        names = best_trials(Sweep.open(arguments.storage, arguments.sweep), arguments.best)
        ingredients += [Ingredient(name, "best") for name in names]
    table = soup(
        arguments.storage,
        ingredients,
        arguments.new_name,
        how="greedy" if arguments.greedy else "uniform",
        metric=arguments.metric,
        weights=arguments.weights,
        data=arguments.data,
        address=arguments.address,
        verbose=arguments.verbose,
        say=Display().say,
    )
    together = None
    if arguments.ensemble:
        own = [Ingredient(arguments.new_name)]
        together = judged_together(arguments, ingredients, "soft", own)
    if arguments.json:
        more = {} if together is None else {"ensemble": together}
        arguments.out.say_json({"name": arguments.new_name, **table, **more})
    else:
        arguments.out.say(format_soup(table))
        if together is not None:
            arguments.out.say(format_together(together))
        arguments.out.say(f"{arguments.new_name} is in the store")
    return 0


def export_command(arguments: argparse.Namespace) -> int:
    from dray.release.export import export
    from dray.show.progress import Display

    storage, name = locate(arguments)
    step = export(
        storage,
        name,
        arguments.folder,
        step=arguments.step,
        weights=arguments.weights,
        chosen=_chosen(arguments),
        adapters_alone=arguments.adapters,
        form=arguments.format,
        values=arguments.values,
        license=arguments.license,
        key_file=arguments.sign,
        say=Display().say,
    )
    reader = "PeftModel" if arguments.adapters else "AutoModel"
    readers = {
        "folder": f"{reader}.from_pretrained",
        "onnx": "onnxruntime",
        "gguf": "llama.cpp and AutoModelForCausalLM.from_pretrained(…, gguf_file=…)",
    }
    arguments.out.say(
        f"{arguments.folder}: step {step} of {name}, for {readers[arguments.format]}; README.md "
        "says how to load it"
    )
    return 0
