"""What people said of answers: listed, exported, forgotten; and runs that go on by it."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from typing import Any

from dray.errors import RunFailed, SpecError


def continue_command(arguments: argparse.Namespace) -> int:
    """`dray train --continue`."""
    from dray.pipeline.continuing import Wanted, continue_run
    from dray.show.continued import format_continued
    from dray.show.progress import Display

    overrides = list(arguments.overrides)
    if arguments.spec is not None:
        if "=" not in arguments.spec:
            raise SpecError(
                arguments.spec,
                "is a spec beside --continue",
                "a run goes on by its own spec",
                "leave it out, and override what is to be another way: optimizer.learning_rate=…",
            )
        overrides.insert(0, arguments.spec)
    for option in ("fork", "from_trial"):
        if getattr(arguments, option):
            raise SpecError(f"--{option.replace('_', '-')}", "goes with a spec, not --continue")
    wanted = Wanted(
        data=arguments.data or (),
        held=arguments.held or (),
        replay=arguments.replay,
        held_share=arguments.held_share,
        max_drop=arguments.max_drop or (),
        promote=arguments.promote,
        overrides=overrides,
    )
    done = continue_run(
        arguments.storage,
        arguments.continued,
        wanted,
        run_name=arguments.run_name,
        address=arguments.address,
        verbose=arguments.verbose,
        say=Display().say,
    )
    if arguments.json:
        arguments.out.say_json(done.to_json())
    else:
        arguments.out.say(format_continued(done.to_json()))
    return RunFailed.exit_code if done.missed else 0


def feedback_list_command(arguments: argparse.Namespace) -> int:
    """The entries of a dataset; of a run, at which steps it learnt them."""
    from dray.pipeline.learnt import find_learnt
    from dray.runs import Run

    dataset = _open(arguments)
    entries = dataset.entries()
    steps: Any = {}
    if arguments.run is not None:
        steps = find_learnt(Run.open(arguments.storage, arguments.run), dataset)
    if arguments.json:
        document: dict[str, Any] = {
            "name": dataset.name,
            "entries": [one.model_dump(mode="json", exclude_none=True) for one in entries],
            "forgotten": dataset.forgotten(),
        }
        if arguments.run is not None:
            document |= {"run": arguments.run, "learnt": dict(steps)}
        arguments.out.say_json(document)
        return 0
    for one in entries:
        said = one.rating or ""
        right = one.label if one.text is None else one.text
        told = [one.id, _day(one.at), f"{one.model}@{one.version}", one.key or "", said]
        told += ["" if right is None else _short(right), _short(next(iter(one.asked.values()), ""))]
        if arguments.run is not None:
            own = steps.get(one.id, [])
            told.append(f"steps {', '.join(map(str, own[:5]))}" if own else "not learnt")
        arguments.out.say("\t".join(told))
    gone = len(dataset.forgotten())
    learnt = sum(bool(own) for own in steps.values())
    more = f"; {arguments.run} has learnt {learnt} of {len(steps)}" if arguments.run else ""
    arguments.out.say(f"{len(entries)} entries, {gone} forgotten{more}")
    return 0


def feedback_export_command(arguments: argparse.Namespace) -> int:
    """A dataset as a file of JSON lines."""
    dataset = _open(arguments)
    lines = []
    for one in dataset.entries():
        value = {
            "entries": lambda one=one: one.model_dump(mode="json", exclude_none=True),
            "records": one.record,
            "judgements": one.judgement,
        }[arguments.form]()
        if value is not None:
            lines.append(json.dumps(value, ensure_ascii=False) + "\n")
    with open(arguments.file, "x", encoding="utf-8") as file:
        file.writelines(lines)
    arguments.out.say(f"{arguments.file}: {len(lines)} of {len(dataset.entries())} entries")
    return 0


def feedback_redact_command(arguments: argparse.Namespace) -> int:
    """Entries without the personal data that is found in them."""
    from collections import Counter

    from dray.corpus.redacting import make_redactor, told_counts
    from dray.spec import Redaction

    dataset = _open(arguments)
    redactor = make_redactor(Redaction(mode=arguments.mode), "dray feedback redact")
    assert redactor is not None
    counts: Counter[str] = Counter()
    changed = []
    for one in dataset.entries():
        kept = {
            name: value
            for name in ("asked", "answered", "text", "comment")
            if (value := getattr(one, name)) is not None
        }
        found, own = redactor.redact_tree(kept)
        if own:
            counts += own
            changed.append(one.model_copy(update=found))
    gone = dataset.replace(changed)
    told = f": {told_counts(counts)}" if counts else ""
    arguments.out.say(f"{len(changed)} entries were redacted{told}; {len(gone)} snapshots deleted")
    return 0


def feedback_forget_command(arguments: argparse.Namespace) -> int:
    """Entries that are not to be kept, with what was made of them."""
    from dray.runs import list_runs

    dataset = _open(arguments)
    ids = list(dict.fromkeys(arguments.ids))
    if arguments.key is not None:
        ids += [one.id for one in dataset.entries() if one.key == arguments.key]
    if not ids:
        raise SpecError("dray feedback forget", "names no entry", "", "give ids, or --key NAME")
    snapshots = {one.train: one for one in dataset.snapshots()}
    learnt = [
        run.name
        for run in list_runs(arguments.storage, trials=True)
        for source in run.spec().data.train
        for path in source.paths
        if path in snapshots and {*ids} & {*snapshots[path].train_ids}
    ]
    gone = dataset.forget(ids, arguments.reason)
    arguments.out.say(f"deleted: entries {len(ids)}, snapshots {len(gone)}")
    for name in dict.fromkeys(learnt):
        arguments.out.say(f"run {name} has learnt from them: its rows and weights still hold them")
    return 0


def _open(arguments: argparse.Namespace) -> Any:
    from dray.feedback import Dataset

    dataset = Dataset(arguments.storage, arguments.name)
    if not dataset.exists:
        raise SpecError(
            f"feedback {arguments.name!r}",
            "is not in this storage",
            f"`dray serve … --feedback {arguments.name}` takes it in",
            "name its storage with --storage",
        )
    return dataset


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _short(value: Any) -> str:
    """On one line, and not long."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:59]}…"
