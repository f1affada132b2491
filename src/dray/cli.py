"""The command line: parse, call, print, exit code. Nothing here computes.

`--help` and `plan` import neither torch nor ray; every other command imports what it needs when it
is called. Exit codes: 0 done; 2 the user's mistake; 3 the run failed; 130 interrupted with its
state saved (143 by SIGTERM, 129 by SIGHUP). Whatever goes wrong is one line on standard error.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dray import __version__
from dray.errors import DrayError, PlanError, RunFailed, SpecError, StoreError, UserError
from dray.processes.signals import Stopped, stops
from dray.processes.streams import ReaderLeft, Results, open_streams, results_apart, warn
from dray.redaction import redact

if TYPE_CHECKING:
    from dray.plan import Plan, Shape
    from dray.runs import Run
    from dray.spec import Spec

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Standard output gets the command's result and
    nothing else."""
    open_streams()
    with results_apart() as out, stops():
        try:
            arguments = _parse(argv, out)
            return int(arguments.command(arguments))
        except ReaderLeft:
            return 0
        except SystemExit:  # of the parser, which has said all
            raise
        except BaseException as error:
            return _tell(error, argv)


def _tell(error: BaseException, argv: Sequence[str] | None) -> int:
    """Say on standard error, in a line, why a command ends. Returns the exit code."""
    if isinstance(error, RunFailed):
        warn(str(error))
        if error.diagnosis:
            warn(error.diagnosis, prefix="")
        return error.exit_code
    if isinstance(error, DrayError):
        warn(str(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        number = error.number if isinstance(error, Stopped) else int(signal.SIGINT)
        warn(f"interrupted by {signal.Signals(number).name}")
        return 128 + number
    return _tell_unexpected(error, argv)


def _tell_unexpected(error: BaseException, argv: Sequence[str] | None) -> int:
    """An error that nobody foresaw is one line, too; its traceback goes to a file, and to
    --verbose."""
    text = redact("".join(traceback.format_exception(error)))
    what = next(iter(str(error).splitlines()), "")
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        what = f"{where}{error.strerror}"
    elif isinstance(error, MemoryError):
        what = "out of memory"
    else:
        what = f"{type(error).__name__}: {what}".rstrip(": ")
    if "--verbose" in (sys.argv[1:] if argv is None else argv):
        warn(text, prefix="")
    try:
        descriptor, path = tempfile.mkstemp(prefix="dray-error-", suffix=".log")
        with open(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        warn(f"{what[:300]}; this was not foreseen; the traceback is in {path}")
    except OSError:
        warn(f"{what[:300]}; this was not foreseen; --verbose shows the traceback")
    return UserError.exit_code if isinstance(error, OSError) else RunFailed.exit_code


def _parse(argv: Sequence[str] | None, out: Results) -> argparse.Namespace:
    """The arguments of a command, and `out` for its result. Raises SystemExit where the parser has
    said all."""
    parser = build_parser()
    try:
        with redirect_stdout(out.stream):
            arguments, rest = parser.parse_known_args(argv)
    except SystemExit:
        out.finish()
        raise
    # argparse takes positionals only in one run; overrides may stand after options too.
    if rest and (not hasattr(arguments, "overrides") or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    for text in sys.argv[1:] if argv is None else argv:
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
            raise SpecError(
                ascii(text)[:200],
                "is not UTF-8",
                "arguments are text that files and records can hold",
                "rename the file, or set LANG=C.UTF-8",
            )
    if getattr(arguments, "storage", None) == "":
        raise StoreError(
            "--storage", "is empty", "runs need a folder or a URI", "leave it out for ./runs"
        )
    try:
        os.getcwd()
    except OSError as error:
        raise StoreError(
            "the working directory",
            f"cannot be used ({error.strerror})",
            "relative paths start there",
            "cd into a folder that exists",
        ) from error
    arguments.out = out
    return arguments


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        warn(f"{' '.join(message.split())}; `{self.prog} --help` lists what there is")
        raise SystemExit(UserError.exit_code)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="dray",
        description="From raw, sharded text to a trained transformer on Ray and DeepSpeed, from "
        "one spec file.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    init = _add(commands, "init", _init, "write a recipe to edit")
    init.add_argument("name", help="name of the new spec; NAME.yaml is written")
    init.add_argument(
        "--recipe", default="quickstart", help="the recipe to start from (default: quickstart)"
    )

    plan = _add_spec(commands, "plan", _plan, "what it will take; no cluster needed")
    plan.add_argument("--shape", help="hardware that is not here, e.g. 2x8xH100")
    plan.add_argument(
        "--measure",
        action="store_true",
        help="time some steps of thin copies of the model on this machine's CPUs, once, and go by "
        "that",
    )
    _add_json(plan)

    prepare = _add_spec(commands, "prepare", _prepare, "raw corpus → token shards")
    _add_cluster(prepare)
    _add_json(prepare)

    train = _add_spec(commands, "train", _train, "run it, or resume it")
    _add_cluster(train)
    _add_json(train)
    train.add_argument("--run", dest="run_name", help="name of the run (default: the spec's name)")
    train.add_argument(
        "--fork", metavar="NEW_NAME", help="start a new run from the newest checkpoint of this one"
    )

    _add_uses(commands)

    runs = _add(commands, "runs", _runs, "list the runs of a storage")
    _add_storage(runs)
    _add_json(runs)

    show = _add_run(commands, "show", _show, "what a run did and has")
    _add_json(show)

    doctor = _add_run(commands, "doctor", _doctor, "why a run ended as it did, and the way out")
    _add_json(doctor)

    verify = _add_run(
        commands, "verify", _verify, "check a checkpoint, byte for byte, or the ledger of rows used"
    )
    verify.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    verify.add_argument(
        "--ledger",
        action="store_true",
        help="prove instead that up to that step each row of each epoch was used exactly once",
    )
    _add_json(verify)
    return parser


def _add_uses(commands: Any) -> None:
    """What is done with a trained model."""
    evaluate = _add_run(commands, "evaluate", _evaluate, "metrics of a checkpoint on data")
    evaluate.add_argument(
        "--data",
        action="append",
        metavar="SOURCE",
        help="a path, or a YAML mapping like a spec's data source, read as the run's own source of "
        "that form is (default: the validation rows)",
    )
    evaluate.add_argument(
        "--thorough",
        action="store_true",
        help="to the letter of the task's metric, at a greater cost: masked models hide each token "
        "by itself",
    )
    evaluate.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="measure with N workers on Ray, each with a CPU, and a GPU where there are some "
        "(default: in this process)",
    )
    _add_checkpoint(evaluate)
    _add_cluster(evaluate)
    _add_json(evaluate)

    predict = _add_run(commands, "predict", _predict, "what a checkpoint tells of each record")
    predict.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="SOURCE",
        help="a path, or a YAML mapping like a spec's data source; targets are not needed",
    )
    predict.add_argument(
        "--out", dest="file", help="the file to write; must not exist (default: standard output)"
    )
    _add_checkpoint(predict)

    generate = _add_run(commands, "generate", _generate, "text from a checkpoint")
    generate.add_argument(
        "--prompt", action="append", required=True, help="may be given several times"
    )
    generate.add_argument(
        "--max-tokens", type=int, default=64, help="new tokens at most (default: 64)"
    )
    generate.add_argument(
        "--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)"
    )
    generate.add_argument(
        "--top-p", type=float, default=0.95, help="nucleus of the distribution (default: 0.95)"
    )
    generate.add_argument("--seed", type=int, default=0)
    _add_checkpoint(generate)
    _add_json(generate)

    export = _add_run(commands, "export", _export, "a Hugging Face folder from a checkpoint")
    export.add_argument("folder", help="the folder to write; must not exist or be empty")
    _add_checkpoint(export)


def _add(commands: Any, name: str, command: Command, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    parser.set_defaults(command=command)
    return parser


def _add_spec(commands: Any, name: str, command: Command, text: str) -> argparse.ArgumentParser:
    parser = _add(commands, name, command, text)
    parser.add_argument("spec", metavar="SPEC", help="a spec file or the name of a recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of dotted spec paths"
    )
    _add_storage(parser)
    return parser


def _add_run(commands: Any, name: str, command: Command, text: str) -> argparse.ArgumentParser:
    parser = _add(commands, name, command, text)
    parser.add_argument(
        "run", metavar="RUN", help="name of a run in the storage, or the path of its folder"
    )
    _add_storage(parser)
    return parser


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage", default="./runs", metavar="DIR_OR_URI", help="where runs lie (default: ./runs)"
    )


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="a Ray cluster (default: RAY_ADDRESS, else a local Ray)")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own messages")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout and nothing else there"
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", help="step of the checkpoint, or `best` (default: the newest)")
    parser.add_argument(
        "--weights",
        choices=("trained", "ema"),
        default="trained",
        help="the trained weights, or their moving average, where the spec has one",
    )


def _locate(arguments: argparse.Namespace) -> tuple[str, str]:
    """Storage and name of a run given by name or by the path of its folder."""
    given = arguments.run.rstrip("/")
    if "/" in given:
        storage, _, name = given.rpartition("/")
        return storage or "/", name
    return arguments.storage, given


def _init(arguments: argparse.Namespace) -> int:
    import re

    from dray.spec import NAME_RULE, RUN_NAME, load_text

    if not re.match(RUN_NAME, arguments.name):
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


def _plan(arguments: argparse.Namespace) -> int:
    from dray.models.counting import make_counted_plan
    from dray.plan import format_plan, local_shape, parse_shape, with_measured_step
    from dray.rank.rehearsal import find_rehearsal, rehearse
    from dray.spec import load_spec

    spec = load_spec(arguments.spec, arguments.overrides)
    if arguments.shape and arguments.measure:
        raise PlanError(
            "--measure",
            f"--shape {arguments.shape} is not this machine",
            "only what is here can be measured",
            "leave one of them out",
        )
    shape = parse_shape(arguments.shape) if arguments.shape else local_shape()
    spec, config = _find_run_inputs(spec, arguments.storage)
    plan = _plan_known_corpus(spec, shape, arguments.storage, config) or make_counted_plan(
        spec, shape, config=config
    )
    measured = None if arguments.shape else find_rehearsal(spec, plan, config)
    if arguments.measure and measured is None:
        spec.optimizer.check_package()
        measured = rehearse(spec, plan, config)
    if measured is not None:
        plan = with_measured_step(plan, measured.step_seconds(plan.batch.accumulation))
    if arguments.json:
        arguments.out.say_json(plan.model_dump(mode="json"))
    else:
        arguments.out.say(format_plan(plan))
    return 0


def _find_run_inputs(spec: Spec, storage: str) -> tuple[Spec, Mapping[str, Any] | None]:
    """The spec with the folder of the tokeniser that is another run's, and the configuration of the
    other run that its model starts from; None where it starts from none."""
    config = None
    if spec.model.run:
        from dray.rank.initial_weights import find_run_weights

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


def _prepare(arguments: argparse.Namespace) -> int:
    from dray.cluster.connection import connect
    from dray.corpus.prepare import prepare
    from dray.runs import check_storage
    from dray.show.progress import Display
    from dray.spec import load_spec

    spec = load_spec(arguments.spec, arguments.overrides)
    check_storage(arguments.storage)
    with connect(arguments.address, num_cpus=1, verbose=arguments.verbose):
        display = Display()
        corpus = prepare(spec, arguments.storage, display.say)
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


def _train(arguments: argparse.Namespace) -> int:
    from dray.show.report import format_summary
    from dray.spec import load_spec
    from dray.train.driver import train

    spec = load_spec(arguments.spec, arguments.overrides)
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


def _predict(arguments: argparse.Namespace) -> int:
    from dray.release.predict import Counts, predict, write_records
    from dray.show.progress import Display

    storage, name = _locate(arguments)
    counts = Counts()
    found = predict(
        storage, name, arguments.data, step=arguments.step, weights=arguments.weights, counts=counts
    )
    if arguments.file is None:
        for record in found:
            arguments.out.say_record(record)
    else:
        write_records(found, arguments.file)
    bad = f", {counts.num_bad:,} could not be read" if counts.num_bad else ""
    cut = f", {counts.num_cut:,} lost what a row has no place for" if counts.num_cut else ""
    Display().say(f"{counts.num_predicted:,} records predicted{cut}{bad}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from dray.release.evaluate import evaluate

    storage, name = _locate(arguments)
    report: dict[str, dict[str, float]] = {}
    result = evaluate(
        storage,
        name,
        data=arguments.data,
        step=arguments.step,
        weights=arguments.weights,
        thorough=arguments.thorough,
        workers=arguments.workers,
        address=arguments.address,
        verbose=arguments.verbose,
        report=report,
    )
    if arguments.json:
        arguments.out.say_json(result)
    else:
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
    return 0


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


def _generate(arguments: argparse.Namespace) -> int:
    from dray.release.generate import generate
    from dray.show.progress import Display

    storage, name = _locate(arguments)
    texts = generate(
        storage,
        name,
        arguments.prompt,
        step=arguments.step,
        weights=arguments.weights,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        say=Display().say,
    )
    if arguments.json:
        arguments.out.say_json(
            [{"prompt": p, "text": t} for p, t in zip(arguments.prompt, texts, strict=True)]
        )
        return 0
    for prompt, text in zip(arguments.prompt, texts, strict=True):
        arguments.out.say(f"── {prompt}\n{prompt}{text}\n")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from dray.release.export import export
    from dray.show.progress import Display

    storage, name = _locate(arguments)
    step = export(
        storage,
        name,
        arguments.folder,
        step=arguments.step,
        weights=arguments.weights,
        say=Display().say,
    )
    arguments.out.say(f"{arguments.folder}: step {step} of {name}, for AutoModel.from_pretrained")
    return 0


def _runs(arguments: argparse.Namespace) -> int:
    from dray.runs import list_runs
    from dray.show.report import format_runs

    summaries = [run.summary() for run in list_runs(arguments.storage)]
    if arguments.json:
        arguments.out.say_json(summaries)
    else:
        arguments.out.say(format_runs(summaries))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from dray.runs import Run
    from dray.show.report import format_summary, load_account

    run = Run.open(*_locate(arguments))
    if arguments.json:
        arguments.out.say_json({**run.summary(), "data": load_account(run)})
    else:
        arguments.out.say(format_summary(run))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from dray.doctor import diagnose
    from dray.runs import Run
    from dray.show.report import format_diagnosis

    diagnosis = diagnose(Run.open(*_locate(arguments)))
    if arguments.json:
        arguments.out.say_json(diagnosis.to_json())
    else:
        arguments.out.say(format_diagnosis(diagnosis))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from dray.runs import Run, find_checkpoint, verify_checkpoint
    from dray.show.report import format_verification

    run = Run.open(*_locate(arguments))
    if arguments.ledger:
        return _verify_ledger(run, arguments)
    report = verify_checkpoint(run, find_checkpoint(run, arguments.step))
    if arguments.json:
        arguments.out.say_json(report.to_json())
    else:
        arguments.out.say(format_verification(report))
    return 0 if report.ok else 3


def _verify_ledger(run: Run, arguments: argparse.Namespace) -> int:
    from dray.ledger import verify_ledger
    from dray.show.report import format_ledger

    report = verify_ledger(run, arguments.step)
    if arguments.json:
        arguments.out.say_json(report.to_json())
    else:
        arguments.out.say(format_ledger(report))
    return 0 if report.ok else 3


if __name__ == "__main__":
    sys.exit(main())
