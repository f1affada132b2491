"""A file of records with the labels that rules give them, for a spec's data to name.

Records are read twice: once for what every rule says, once to be written; in between a byte a rule
and a record is held. Refuses sources that cannot be read, and a file that is there already.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dray.corpus.labelling.model import Floats, Votes, fit, majority
from dray.corpus.labelling.rules import Rules, make_voters
from dray.corpus.reading import Span, SpanReader
from dray.corpus.sources import list_source
from dray.errors import CorpusError, PlanError, StoreError
from dray.processes.streams import write_records
from dray.spec import Field, Source
from dray.tasks.parts.rules import ABSTAINS

Places = npt.NDArray[np.int64]
By = Literal["model", "majority"]
RECORD = {"record": Field("record")}
MOST_BYTES = 16 * 1024 * 1024
"""Of a record."""


def label_records(
    rules: Rules,
    sources: Sequence[Source],
    file: str,
    *,
    by: By = "model",
    least: float = 0.0,
    gold: str | None = None,
    program: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write `file`, a line of JSON for each record that has a label: its columns, `label` and
    `label_share`. Records of which no rule says anything, or whose label is less likely than
    `least`, are left out and counted. `gold`: a column of right labels, by which rules and labels
    are measured, and nothing is learnt.

    Returns `num_records`, `num_labelled`, `num_silent`, `num_unsure`, `num_bad`, `labels` (counts),
    `rules` (by name `coverage`, `overlap`, `conflict`, the `accuracy` that the model takes it for
    and, with gold labels, `gold_accuracy`), and `gold`. Raises UserError.
    """
    if os.path.lexists(file):
        raise StoreError(
            file, "is there already", "labelled records go to a new file", "name another"
        )
    if not 0 <= least <= 1:
        raise PlanError("--least", f"is {least:g}", "a share is 0 to 1")
    slow: Counter[str] = Counter()
    voters = make_voters(rules, program, slow)
    held, golds, num_bad = bytearray(), list[int](), 0
    for record in _records(sources):
        if record is None:
            num_bad += 1
            continue
        if rules.text not in record and not held:
            raise CorpusError(
                "text", f"no column {rules.text}: {', '.join(record)}", "rules look at a column",
                "name it as `text` of the rules",
            )  # fmt: skip
        held += np.array([vote(record) for vote in voters], np.int8).tobytes()
        if gold is not None:
            golds.append(_gold(record, gold, rules))
    if not held:
        raise CorpusError("--data", "has no record that can be read", "rules are asked of records")
    votes: Votes = np.frombuffer(held, np.int8).reshape(-1, len(voters))
    num_labels = len(rules.labels)
    frequent = np.array([rules.balance.get(label, 1.0) for label in rules.labels])
    model = fit(votes, frequent / frequent.sum())
    shares = model.shares(votes) if by == "model" else majority(votes, num_labels)
    spoken = (votes != ABSTAINS).any(axis=1)
    chosen, share = shares.argmax(axis=1), shares.max(axis=1)
    # A majority that is none keeps out, too.
    sure = (share >= least) & (np.sum(shares == share[:, None], axis=1) == 1)
    kept = spoken & sure
    told_labels = _told_labels(sources, kept, chosen, share, rules)
    write_records(told_labels, file, "labelled records")
    for name, count in slow.items():
        say(f"rule {name} took too long over {count:,} records, and kept out")
    told: dict[str, Any] = {
        "file": file,
        "by": by,
        "num_records": len(votes),
        "num_labelled": int(kept.sum()),
        "num_silent": int((~spoken).sum()),
        "num_unsure": int((spoken & ~sure).sum()),
        "num_bad": num_bad,
        "labels": {
            label: int((chosen[kept] == number).sum()) for number, label in enumerate(rules.labels)
        },
        "rules": _rules_told(rules, votes, model.accuracies, np.array(golds, np.int8)),
    }
    if gold is not None:
        told["gold"] = _gold_told(votes, chosen, kept, np.array(golds, np.int8), num_labels)
    return told


def _records(sources: Sequence[Source]) -> Iterator[dict[str, Any] | None]:
    """Records with all their columns; None for each that cannot be read."""
    for number, source in enumerate(sources):
        for file in list_source(source, f"--data {number}").files:
            for documents in SpanReader(Span(file), source, MOST_BYTES, RECORD).read():
                for text in documents.texts:
                    yield json.loads(text.as_py())
                for _ in documents.bad:
                    yield None


def _gold(record: dict[str, Any], column: str, rules: Rules) -> int:
    value = record.get(column)
    if str(value) not in rules.labels:
        raise CorpusError(
            f"--gold {column}",
            f"a record has {value!r} there",
            f"labels are {', '.join(rules.labels)}",
        )
    return rules.labels.index(str(value))


def _rules_told(
    rules: Rules, votes: Votes, accuracies: Floats, golds: Votes
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    there = votes != ABSTAINS
    counts = there.sum(axis=1)
    for place, rule in enumerate(rules.rules):
        own = there[:, place]
        differs = (there & (votes != votes[:, [place]])).any(axis=1)
        found[rule.name] = {
            "coverage": float(own.mean()),
            "overlap": float((own & (counts > 1)).mean()),
            "conflict": float((own & differs).mean()),
            "accuracy": float(accuracies[place]) if own.any() else None,
        }
        if len(golds):
            right = (votes[own, place] == golds[own]).mean() if own.any() else None
            found[rule.name]["gold_accuracy"] = None if right is None else float(right)
    return found


def _gold_told(
    votes: Votes, chosen: Places, kept: Any, golds: Votes, num_labels: int
) -> dict[str, float | None]:
    """How often labels are right: those that are written, and what a majority would have said of
    the same records."""
    if not kept.any():
        return {"accuracy": None, "majority_accuracy": None}
    most = majority(votes, num_labels).argmax(axis=1)
    return {
        "accuracy": float((chosen[kept] == golds[kept]).mean()),
        "majority_accuracy": float((most[kept] == golds[kept]).mean()),
    }


def _told_labels(
    sources: Sequence[Source], kept: Any, chosen: Places, share: Floats, rules: Rules
) -> Iterator[dict[str, Any]]:
    """The records that are kept, with their labels."""
    whole = (record for record in _records(sources) if record is not None)
    for number, record in enumerate(whole):
        if kept[number]:
            label = rules.labels[int(chosen[number])]
            yield {**record, "label": label, "label_share": round(float(share[number]), 6)}
