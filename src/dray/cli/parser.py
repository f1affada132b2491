"""All commands and their options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import Any

from dray import __version__
from dray.cli.beginning import (
    init_command,
    ladder_command,
    plan_command,
    prepare_command,
    release_command,
    train_command,
    tune_command,
)
from dray.cli.explaining import explain_command
from dray.cli.feedback import (
    feedback_export_command,
    feedback_forget_command,
    feedback_list_command,
    feedback_redact_command,
)
from dray.cli.forgetting import forget_command
from dray.cli.labelling import label_command
from dray.cli.looking import (
    doctor_command,
    report_command,
    runs_command,
    show_command,
    verify_command,
)
from dray.cli.serving import (
    key_create_command,
    key_list_command,
    key_revoke_command,
    promote_command,
    rollback_command,
    serve_command,
    versions_command,
)
from dray.cli.submitting import (
    OPTIONS,
    add_options,
    arrive_command,
    leave_command,
    stop_command,
    submit_command,
)
from dray.cli.using import (
    compress_command,
    evaluate_command,
    export_command,
    generate_command,
    predict_command,
    soup_command,
)
from dray.cli.words import Parser
from dray.errors import SpecError, StoreError
from dray.processes.streams import Results

Command = Callable[[argparse.Namespace], int]


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="dray",
        description="From raw, sharded text to a trained transformer on Ray and DeepSpeed, from "
        "one spec file.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    init = _add(commands, "init", init_command, "write a recipe to edit")
    init.add_argument("name", help="name of the new spec; NAME.yaml is written")
    init.add_argument(
        "--recipe", default="quickstart", help="the recipe to start from (default: quickstart)"
    )

    plan = _add_spec(commands, "plan", plan_command, "what it will take; no cluster needed")
    plan.add_argument("--shape", help="hardware that is not here, e.g. 2x8xH100")
    plan.add_argument(
        "--measure",
        action="store_true",
        help="time some steps of thin copies of the model on this machine's CPUs, once, and go by "
        "that",
    )
    _add_prices(plan)
    plan.add_argument(
        "--space", help="what a sweep of it will take, by a space file or a packaged one's name"
    )
    plan.add_argument("--address", help="for the nodes of this Ray cluster, and beside them")
    _add_json(plan)

    prepare = _add_spec(commands, "prepare", prepare_command, "raw corpus → token shards")
    prepare.add_argument(
        "--html",
        metavar="FILE",
        help="what was kept, what was left out and why, with examples, as one page; replaces FILE",
    )
    _add_cluster(prepare)
    _add_json(prepare)

    _add_train(commands)
    _add_release(commands)

    tune = _add_spec(commands, "tune", tune_command, "sweep it, or go on with it")
    tune.add_argument(
        "--space",
        required=True,
        help="a space file or the name of a packaged one; space.key=value overrides its keys",
    )
    tune.add_argument(
        "--run", dest="run_name", help="name of the sweep (default: the spec's name and -sweep)"
    )
    _add_cluster(tune)
    _add_json(tune)

    ladder = _add_spec(
        commands, "ladder", ladder_command, "smaller models of it, and the loss that they foretell"
    )
    ladder.add_argument(
        "--budget",
        default="5%",
        metavar="AMOUNT",
        help="what the smaller models may take together: 5%% of the spec's compute (the default), "
        "or share=0.05, flops=3e15, hours=2, money=50",
    )
    ladder.add_argument(
        "--for",
        dest="wanted",
        metavar="AMOUNT",
        help="what the real run may take, to be told the best model for it (default: what the spec "
        "takes)",
    )
    _add_price(ladder, "of an hour of one worker, for amounts of money")
    ladder.add_argument(
        "--run", dest="run_name", help="name of the ladder (default: the spec's name and -ladder)"
    )
    _add_cluster(ladder)
    _add_json(ladder)

    _add_label(commands)

    _add_uses(commands)

    _add_serve(commands)

    _add_jobs(commands)

    _add_show(commands)

    report = _add_run(commands, "report", report_command, "a run or a sweep as a page, in one file")
    report.add_argument(
        "--out", dest="file", metavar="FILE", help="the file to write (default: NAME-report.html)"
    )

    doctor = _add_run(
        commands, "doctor", doctor_command, "why a run ended as it did, and the way out"
    )
    _add_json(doctor)

    verify = _add_run(
        commands,
        "verify",
        verify_command,
        "check a checkpoint or an exported folder, byte for byte, or the ledger of rows used",
    )
    verify.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    verify.add_argument(
        "--ledger",
        action="store_true",
        help="prove instead that up to that step each row of each epoch was used exactly once",
    )
    verify.add_argument(
        "--key",
        metavar="PUBLIC.pem",
        help="of an exported folder: it must be signed by this public key's owner",
    )
    _add_json(verify)
    return parser


COMMANDS_OF_WORDS = (
    *(("serve", word) for word in ("promote", "rollback", "versions")),
    *(("serve", "key", word) for word in ("create", "list", "revoke")),
    *(("feedback", word) for word in ("list", "export", "redact", "forget")),
)
"""Commands of more than one word. A run that is called as one of these is served by --name."""


def join_words(argv: Sequence[str]) -> list[str]:
    """The words of a command as one."""
    for words in COMMANDS_OF_WORDS:
        if tuple(argv[: len(words)]) == words:
            return [" ".join(words), *argv[len(words) :]]
    return list(argv)


def parse(argv: Sequence[str] | None, out: Results) -> argparse.Namespace:
    """The arguments of a command, and `out` for its result. Raises SystemExit where the parser has
    said all, and UserError for what no command can begin with."""
    parser = build_parser()
    try:
        with redirect_stdout(out.stream):
            words = join_words(sys.argv[1:] if argv is None else argv)
            arguments, rest = parser.parse_known_args(words)
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


def _add_jobs(commands: Any) -> None:
    """What is done at a cluster from elsewhere, and the list of runs."""
    submit = _add(
        commands, "submit", submit_command, "the same command through a cluster's server of jobs"
    )
    submit.set_defaults(parse=parse, **OPTIONS)
    add_options(submit)
    submit.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="COMMAND …", help="train SPEC …, tune SPEC …, …"
    )
    arrive = commands.add_parser("arrive")  # nobody types it
    arrive.set_defaults(command=arrive_command, parse=parse)
    arrive.add_argument("versions")
    arrive.add_argument("words", nargs=argparse.REMAINDER)
    leave = _add(
        commands, "leave", leave_command, "this node goes: its runs save, and go on elsewhere"
    )
    leave.add_argument("--address", metavar="HOST:PORT", help="of the cluster (default: its own)")
    leave.add_argument(
        "--seconds",
        type=float,
        default=25.0,
        metavar="S",
        help="until it goes (default: 25; Kubernetes gives a pod 30)",
    )
    stop = _add(commands, "stop", stop_command, "end a submitted run, its state saved")
    stop.add_argument("run", metavar="RUN", help="name of the run or sweep")
    stop.add_argument(
        "--storage", metavar="DIR_OR_URI", help="where it lies, if others have its name"
    )
    stop.add_argument("--address", metavar="URL", help="of the server of jobs")

    runs = _add(commands, "runs", runs_command, "list the runs of a storage, or a cluster's jobs")
    _add_storage(runs)
    runs.add_argument("--address", metavar="URL", help="list the jobs of this server of jobs")
    _add_json(runs)


def _add_show(commands: Any) -> None:
    show = _add_run(commands, "show", show_command, "what a run did and has")
    show.add_argument(
        "--augment",
        type=int,
        nargs="?",
        const=3,
        metavar="N",
        help="N rows as augmentation has them, by each of its kinds (default: 3); RUN may be a "
        "spec whose corpus is prepared",
    )
    _add_json(show)


def _add_label(commands: Any) -> None:
    label = _add(commands, "label", label_command, "records labelled by rules, into a new file")
    label.add_argument("rules", metavar="RULES", help="a YAML file of rules: docs/labelling.md")
    label.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="SOURCE",
        help="a path, or a YAML mapping like a spec's data source, of files with columns",
    )
    label.add_argument(
        "--out", dest="file", required=True, help="the file to write; must not exist"
    )
    label.add_argument(
        "--by",
        choices=("model", "majority"),
        default="model",
        help="a model of how often each rule is right, or the most votes (default: model)",
    )
    label.add_argument(
        "--least",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="leave out what is less likely (default: 0)",
    )
    label.add_argument(
        "--gold",
        metavar="COLUMN",
        help="right labels, by which rules are measured; nothing is learnt from them",
    )
    label.add_argument(
        "--program", metavar="FILE", help="the Python file whose functions rules may name; it runs"
    )
    _add_json(label)


def _add_explain(commands: Any) -> None:
    explain = _add_run(
        commands,
        "explain",
        explain_command,
        "what predictions hang on, and the training rows that are like them",
    )
    explain.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="SOURCE",
        help="a path, or a YAML mapping like a spec's data source; targets are not needed",
    )
    explain.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="the first N records (default: 10; 1000 of a task that finds features)",
    )
    explain.add_argument(
        "--features",
        type=int,
        metavar="N",
        help="of a task that finds features, N of those that fire most often (default: 20)",
    )
    explain.add_argument(
        "--method",
        choices=("gradients", "rollout", "occlusion", "none"),
        help="integrated gradients or attention rollout of tokens, occlusion of patches of images "
        "(default: gradients, of images occlusion)",
    )
    explain.add_argument(
        "--neighbours",
        type=int,
        default=5,
        metavar="K",
        help="training rows that are most like each record (default: 5; 0: none)",
    )
    explain.add_argument(
        "--by",
        choices=("cosine", "gradient"),
        default="cosine",
        help="likeness: the cosine of what the last layer is given, or the product of the loss' "
        "gradients there, which has rows that taught against it, too (default: cosine)",
    )
    explain.add_argument(
        "--search",
        type=int,
        metavar="N",
        help="look at N training rows, evenly spread (default: all)",
    )
    explain.add_argument(
        "--no-trace",
        action="store_true",
        help="do not look for these rows in the raw files and in the run's history",
    )
    explain.add_argument(
        "--html",
        metavar="FILE",
        help="all of it as one page, which needs no network; replaces FILE",
    )
    _add_checkpoint(explain)
    _add_json(explain)


def _add_release(commands: Any) -> None:
    """All of it, from one spec."""
    release = _add_spec(
        commands,
        "release",
        release_command,
        "prepare, train, evaluate, compress, export and serve, as the spec's sections say; what is "
        "there already is not done again",
    )
    _add_cluster(release)
    _add_json(release)
    release.add_argument(
        "--run", dest="run_name", help="name of the run (default: the spec's name)"
    )
    release.add_argument(
        "--until",
        metavar="STAGE",
        help="the last stage: prepare, train, evaluate, compress, export, promote (a version of "
        "the served name) or serve",
    )


def _add_judging(evaluate: argparse.ArgumentParser) -> None:
    """What is asked of an evaluation besides its metrics."""
    evaluate.add_argument(
        "--intervals",
        type=int,
        nargs="?",
        const=1000,
        metavar="N",
        help="a 95 %% interval of each metric, by N samples of the rows (default: 1000)",
    )
    evaluate.add_argument(
        "--slices",
        action="append",
        metavar="KIND",
        help="metrics of parts of the rows, by label, length or source; may be given several times",
    )
    evaluate.add_argument(
        "--calibrate",
        action="store_true",
        help="fit a temperature on half of the rows and measure it on the other half",
    )
    evaluate.add_argument(
        "--against",
        metavar="RUN2",
        help="how much greater each metric is in that run (its best or newest step as --step says) "
        "on the same rows, with interval and p-value",
    )
    evaluate.add_argument(
        "--checks",
        metavar="FILE",
        help="prompts with what is expected of their answers, a line of JSON each: "
        "docs/evaluating.md",
    )
    evaluate.add_argument(
        "--program",
        metavar="FILE",
        help="the Python file whose functions --checks may name; it runs",
    )
    evaluate.add_argument(
        "--max-tokens", type=int, default=64, help="of an answer to a check (default: 64)"
    )
    evaluate.add_argument(
        "--html",
        metavar="FILE",
        help="all of it as one page, which needs no network; replaces FILE",
    )
    evaluate.add_argument(
        "--texts",
        action="store_true",
        help="the texts of the rows that the model is most wrong of, too, in the page and the JSON",
    )


def _add_uses(commands: Any) -> None:
    """What is done with a trained model."""
    evaluate = _add(commands, "evaluate", evaluate_command, "metrics of a checkpoint on data")
    _add_runs(evaluate)
    evaluate.add_argument(
        "--metric",
        help="of several models: by which the best one is told (default: validation.metric)",
    )
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
    _add_judging(evaluate)
    _add_checkpoint(evaluate)
    _add_adapters(evaluate)
    _add_cluster(evaluate)
    _add_json(evaluate)

    predict = _add(commands, "predict", predict_command, "what a checkpoint tells of each record")
    _add_runs(predict)
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
    _add_adapters(predict)

    _add_explain(commands)

    generate = _add_run(commands, "generate", generate_command, "text from a checkpoint")
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
    generate.add_argument(
        "--beams",
        type=int,
        default=1,
        help="more than 1: the likeliest text by a search of so many at once, without sampling",
    )
    _add_checkpoint(generate)
    _add_adapters(generate)
    _add_json(generate)

    compress = _add_run(
        commands, "compress", compress_command, "a smaller or faster run from a checkpoint"
    )
    compress.add_argument(
        "--with",
        dest="methods",
        action="append",
        metavar="METHOD[:key=value,…]",
        help="int8, layers:keep=3, …, in the order in which they are given (docs/compress.md)",
    )
    compress.add_argument(
        "--name", dest="new_name", help="of the new run (default: RUN and the methods' names)"
    )
    compress.add_argument(
        "--data",
        action="append",
        metavar="SOURCE",
        help="measure on other data, as `dray evaluate` does (default: the validation rows)",
    )
    compress.add_argument(
        "--max-drop",
        action="append",
        metavar="METRIC=AMOUNT",
        help="keep nothing, and end with 3, if a metric gets worse by more: accuracy=0.01, or "
        "perplexity=5%% of what it was; may be given several times",
    )
    _add_checkpoint(compress)
    _add_cluster(compress)
    _add_json(compress)

    export = _add_run(
        commands, "export", export_command, "a checkpoint's model as a folder for others"
    )
    export.add_argument("folder", help="the folder to write; must not exist or be empty")
    export.add_argument(
        "--adapters",
        action="store_true",
        help="the adapters alone, for PeftModel.from_pretrained (default: merged into the weights)",
    )
    export.add_argument(
        "--format",
        choices=("folder", "onnx", "gguf"),
        default="folder",
        help="a Hugging Face folder (the default), an ONNX graph, or a GGUF file for llama.cpp",
    )
    export.add_argument(
        "--values",
        choices=("f32", "f16", "bf16", "q8_0"),
        default="f16",
        help="how a GGUF file holds the numbers of matrices (default: f16)",
    )
    export.add_argument(
        "--license",
        default="unknown",
        metavar="NAME",
        help="what the card says, as the hub knows it: apache-2.0, mit, … (default: unknown)",
    )
    export.add_argument(
        "--sign",
        metavar="KEYFILE",
        help="sign the list of files with this private key: Ed25519, as PEM",
    )
    _add_checkpoint(export)
    _add_adapters(export)
    _add_soup(commands)


def _add_soup(commands: Any) -> None:
    """One model of several."""
    soup = _add(commands, "soup", soup_command, "one run from the mean of the weights of several")
    soup.add_argument(
        "models", nargs="*", metavar="RUN", help="RUN, RUN@STEP or RUN@best; two or more"
    )
    soup.add_argument("--name", dest="new_name", required=True, help="of the new run")
    soup.add_argument("--sweep", metavar="SWEEP", help="take the best trials of a sweep, too")
    soup.add_argument(
        "--best", type=int, default=3, metavar="K", help="how many of them (default: 3)"
    )
    soup.add_argument(
        "--greedy",
        action="store_true",
        help="the best one, then each that makes the mean no worse (default: all of them)",
    )
    soup.add_argument(
        "--ensemble",
        action="store_true",
        help="compare the soup with the mean of its ingredients' answers, and with the best of "
        "them, on the same rows",
    )
    soup.add_argument(
        "--metric", help="by which they are ranked (default: the first run's validation.metric)"
    )
    soup.add_argument(
        "--data",
        action="append",
        metavar="SOURCE",
        help="measure on other data, as `dray evaluate` does (default: the validation rows)",
    )
    _add_weights(soup)
    _add_storage(soup)
    _add_cluster(soup)
    _add_json(soup)


def _add_serve(commands: Any) -> None:
    """Models behind HTTP."""
    serve = _add(commands, "serve", serve_command, "models behind HTTP, until it is stopped")
    serve.add_argument(
        "models",
        nargs="*",
        metavar="RUN|DIR",
        help="runs of the storage, RUN@STEP or RUN@best of one, or folders that dray export wrote",
    )
    serve.add_argument(
        "--name",
        dest="named",
        action="append",
        metavar="MODEL=RUN",
        help="a run or a folder, under a name of your own; may be given several times",
    )
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="where it listens (default: 127.0.0.1); elsewhere it asks for a key",
    )
    serve.add_argument("--port", type=int, default=8000, help="(default: 8000)")
    serve.add_argument(
        "--replicas",
        default="1",
        metavar="N",
        help="of each model (default: 1); 1-4: as many as are asked for, within that",
    )
    serve.add_argument(
        "--tls-cert", metavar="FILE", help="a certificate, PEM: HTTPS in the place of HTTP"
    )
    serve.add_argument("--tls-key", metavar="FILE", help="its key, PEM, not encrypted")
    serve.add_argument(
        "--log", metavar="FILE", help="a line of JSON a request, without what was asked or answered"
    )
    serve.add_argument(
        "--log-bodies", action="store_true", help="with what was asked and answered, too"
    )
    serve.add_argument(
        "--feedback",
        metavar="NAME",
        help="take in what people say of answers, into this dataset of the storage",
    )
    serve.add_argument(
        "--redact",
        choices=("mask", "pseudonym", "drop"),
        help="take e-mail addresses, phone and card numbers, keys and the like out of what is "
        "asked and of the log; drop: refuse such requests",
    )
    _add_storage(serve)
    _add_cluster(serve)
    _add_versions(commands)
    _add_keys(commands)
    _add_feedback(commands)
    _add_forget(commands)


def _add_train(commands: Any) -> None:
    """Training, by a spec or from another run on."""
    train = _add_spec(commands, "train", train_command, "run it, or resume it", nargs="?")
    _add_cluster(train)
    _add_json(train)
    train.add_argument("--run", dest="run_name", help="name of the run (default: the spec's name)")
    train.add_argument(
        "--fork", metavar="NEW_NAME", help="start a new run from the newest checkpoint of this one"
    )

    train.add_argument(
        "--from-trial",
        metavar="SWEEP/BEST",
        help="with the values of a trial of a sweep: SWEEP/0007, or SWEEP/best",
    )
    _add_continuing(train)


def _add_continuing(train: argparse.ArgumentParser) -> None:
    """A run that goes on learning, instead of a spec."""
    train.add_argument(
        "--continue",
        dest="continued",
        metavar="RUN",
        help="instead of SPEC: a new run from this one's weights, of old rows and new data; both "
        "are measured then",
    )
    train.add_argument(
        "--data",
        action="append",
        metavar="feedback:NAME",
        help="with --continue: what to learn from; feedback, or data as `dray evaluate` takes it",
    )
    train.add_argument(
        "--held",
        action="append",
        metavar="DATA",
        help="with --continue: data like the new, to measure on (of feedback a share is kept out)",
    )
    train.add_argument(
        "--replay",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="with --continue: share of a batch that are old rows (default: 0.5)",
    )
    train.add_argument(
        "--held-share",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="with --continue: share of feedback that is kept out (default: 0.2)",
    )
    train.add_argument(
        "--max-drop",
        action="append",
        metavar="METRIC=AMOUNT",
        help="with --continue: by how much a metric may get worse on the old held-out rows "
        "(default: the validation's metric by 0.01)",
    )
    train.add_argument(
        "--promote",
        metavar="NAME",
        help="with --continue: the served name that gets the new run, if it is let through",
    )


def _add_feedback(commands: Any) -> None:
    """What people said of answers."""
    what = "what people said of answers, and which of it a run has learnt"
    listed = _add_named(commands, "feedback list", feedback_list_command, what)
    listed.add_argument("--run", metavar="RUN", help="at which steps this run has learnt each")
    _add_json(listed)
    exported = _add_named(
        commands, "feedback export", feedback_export_command, "feedback as a file of JSON lines"
    )
    exported.add_argument("--out", dest="file", required=True, metavar="FILE")
    exported.add_argument(
        "--as",
        dest="form",
        choices=("records", "judgements", "entries"),
        default="records",
        help="what is right, to train on; thumbs of texts, for `loss: kto`; or all (default: "
        "records)",
    )
    redact = _add_named(
        commands,
        "feedback redact",
        feedback_redact_command,
        "take e-mail addresses, phone and card numbers, keys and the like out of feedback",
    )
    redact.add_argument("--mode", choices=("mask", "pseudonym"), default="mask")
    forget = _add_named(
        commands, "feedback forget", feedback_forget_command, "delete entries of feedback"
    )
    forget.add_argument("ids", nargs="*", metavar="ID", help="of entries, as they are listed")
    forget.add_argument("--key", metavar="NAME", help="all that came by this key of a service")
    forget.add_argument("--reason", required=True, help="is kept in the place of what is deleted")


def _add_forget(commands: Any) -> None:
    forget = _add(
        commands,
        "forget",
        forget_command,
        "where a document went: corpora, runs, steps, checkpoints; and a run made again without it",
    )
    what = forget.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", metavar="FILE", help="the document, as a file of its text alone")
    what.add_argument(
        "--digest",
        help="its digest, 32 hexadecimal digits; the document is looked for in the raw files",
    )
    forget.add_argument("--again", metavar="RUN", help="train this run's spec again without it")
    forget.add_argument(
        "--run", dest="run_name", metavar="NEW", help="name of that run (default: RUN-2)"
    )
    _add_storage(forget)
    _add_cluster(forget)
    _add_json(forget)


def _add_versions(commands: Any) -> None:
    """Which versions of a served name answer. Commands of two words: see `parse`."""
    promote = _add_named(
        commands, "serve promote", promote_command, "let another run answer for a served name"
    )
    promote.add_argument("run", metavar="RUN|DIR", help="RUN, RUN@STEP, RUN@best, or a folder")
    how = promote.add_mutually_exclusive_group()
    how.add_argument("--share", type=float, help="of requests alone, as a canary: 0.1")
    how.add_argument(
        "--shadow", action="store_true", help="gets copies of requests; its answers are compared"
    )
    what = "end a canary or a shadow; or let the version before answer"
    _add_named(commands, "serve rollback", rollback_command, what)
    what = "the versions of a served name, and who did what when"
    _add_json(_add_named(commands, "serve versions", versions_command, what))


def _add_keys(commands: Any) -> None:
    """Who may ask a service."""
    create = _add_named(
        commands, "serve key create", key_create_command, "make a key of services; shown once"
    )
    create.add_argument(
        "--scopes",
        default="write,predict,models",
        help="of write, predict, models, metrics (default: all but metrics)",
    )
    create.add_argument("--rate", help="60/minute, or 5 per second (default: no limit)")
    create.add_argument("--expires", type=float, metavar="DAYS", help="(default: never)")
    _add_storage(_add(commands, "serve key list", key_list_command, "keys of services"))
    _add_named(commands, "serve key revoke", key_revoke_command, "end a key for good")


def _add_named(commands: Any, name: str, command: Command, text: str) -> argparse.ArgumentParser:
    parser = _add(commands, name, command, text)
    parser.add_argument("name", metavar="NAME")
    _add_storage(parser)
    return parser


def _add(commands: Any, name: str, command: Command, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    parser.set_defaults(command=command)
    return parser


def _add_spec(
    commands: Any, name: str, command: Command, text: str, **options: Any
) -> argparse.ArgumentParser:
    parser = _add(commands, name, command, text)
    parser.add_argument(
        "spec", metavar="SPEC", help="a spec file or the name of a recipe", **options
    )
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


def _add_runs(parser: argparse.ArgumentParser) -> None:
    """One run, or several that are taken together."""
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="name of a run in the storage, or path of its folder"
    )
    parser.add_argument(
        "others",
        nargs="*",
        metavar="RUN",
        help="further ones, to be taken together with it; of several, RUN may be RUN@STEP or "
        "RUN@best",
    )
    parser.add_argument("--sweep", metavar="SWEEP", help="take the best trials of a sweep, too")
    parser.add_argument(
        "--best", type=int, default=3, metavar="K", help="how many of them (default: 3)"
    )
    parser.add_argument(
        "--combine",
        choices=("soft", "hard", "stacking"),
        help="of several models: the mean of probabilities or numbers, a vote each, or a "
        "regression over them, fitted on the held-out rows (default: soft)",
    )
    _add_storage(parser)


def _add_storage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--storage", default="./runs", metavar="DIR_OR_URI", help="where runs lie (default: ./runs)"
    )


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", help="a Ray cluster (default: RAY_ADDRESS, else a local Ray)")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own messages")


def _add_price(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument(
        "--price",
        "--price-per-hour",
        dest="price_per_hour",
        type=float,
        metavar="PRICE",
        help=text,
    )


def _add_prices(parser: argparse.ArgumentParser) -> None:
    _add_price(parser, "of an hour of one worker, with its GPU where it has one: what a run costs")
    parser.add_argument(
        "--instance",
        metavar="TYPE",
        help="what it costs on instances of this type (p5.48xlarge), as many as its workers need "
        "unless --shape or --address says how many",
    )
    parser.add_argument(
        "--prices",
        metavar="FILE",
        help="a table of instances and prices instead of dray's, which holds public ones",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="one JSON document on stdout and nothing else there"
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", help="step of the checkpoint, or `best` (default: the newest)")
    _add_weights(parser)


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        choices=("trained", "ema", "swa"),
        default="trained",
        help="the trained weights, or their moving or equal average, where the spec has one",
    )


def _add_adapters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="RUN",
        help="with the adapters of another run on the same model, too; may be given several times",
    )
    parser.add_argument(
        "--no-adapters", action="store_true", help="without the adapters that the run has trained"
    )
