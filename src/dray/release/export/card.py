"""The card of an export, README.md: what the model is, what it was made of and how, what it
measured, how it is loaded, and what nobody knows of it.

Everything in it is read from the run. It names files of data by the end of their paths alone, and
goes through `redact`: whoever gets the folder need not know where it was made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dray import __version__
from dray.errors import caught, visible
from dray.models.build import num_parameters
from dray.privacy import describe_privacy, privacy_of
from dray.redaction import redact
from dray.release.export.forms import Options, Written
from dray.release.trained import Trained
from dray.runs import Run
from dray.runs.layout import parse_trial_name
from dray.show.report import load_account

CARD = "README.md"
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModel": "feature-extraction",
}
"""What the hub calls the use of a transformers class."""
_MOST_ORIGINS = 20
"""Of a lineage; runs that name each other in a circle end it."""


@dataclass(frozen=True)
class Identity:
    """What a card and a manifest say an export is of."""

    run: str
    step: int
    attempt: int
    fingerprint: str
    weights: str
    weights_sha256: str
    """Of the checkpoint, as `dray verify RUN --step N` prints it."""
    ledger_digest: str
    """Chained digest of the rows of all steps that led there; empty where the checkpoint has
    none."""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def make_card(trained: Trained, identity: Identity, written: Written, options: Options) -> str:
    """The card's text."""
    sections = [
        _front_matter(trained, written, options),
        f"# {trained.run.name}, step {identity.step}",
        "\n".join(_what(trained, options)),
        "## How to load it",
        f"```python\n{written.code}\n```",
        *(("\n".join(f"- {remark}" for remark in written.remarks),) if written.remarks else ()),
        "## Data",
        "\n".join(_data(trained)),
        "## Measured",
        "\n".join(_measured(trained)),
        "## Training",
        "\n".join(_training(trained)),
        "## Lineage",
        "\n".join(f"- {line}" for line in _lineage(trained)),
        "## Proofs",
        "\n".join(_proofs(identity, written)),
        "## Limits",
        "\n".join(_limits(trained, options)),
    ]
    return redact("\n\n".join(sections)) + "\n"


def _front_matter(trained: Trained, written: Written, options: Options) -> str:
    task = trained.spec.task
    plain = task.tokenizes and not task.whole_words  # else no pipeline of texts fits
    pipeline = _PIPELINES.get(task.head.auto_class) if plain or not task.tokenizes else None
    fields = {
        "license": options.license,
        "library_name": written.library,
        **({"pipeline_tag": pipeline} if pipeline else {}),
        "tags": ["dray", task.name, trained.model.config.model_type],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False).strip()}\n---"


def _what(trained: Trained, options: Options) -> Iterator[str]:
    config, spec = trained.model.config, trained.spec
    settings = spec.task.settings.model_dump(mode="json", exclude_defaults=True)
    yield f"- Task: {spec.task.name}{f' {json.dumps(settings)}' if settings else ''}"
    yield f"- Architecture: {config.model_type} ({(config.architectures or ['?'])[0]})"
    yield f"- Parameters: {num_parameters(trained.model):,}"
    if trained.manifest.vocab_size:
        yield (
            f"- Vocabulary: {trained.manifest.vocab_size:,} tokens; rows of "
            f"{trained.manifest.sequence_tokens} in training"
        )
    if trained.manifest.labels:
        labels = ", ".join(map(_quoted, trained.manifest.labels[:50]))
        more = len(trained.manifest.labels) - 50
        yield f"- Labels: {labels}{f' and {more} more' if more > 0 else ''}"
    yield "- Language: unknown; nobody has said which its texts are in"
    unsaid = "; nobody has said which, so nobody may rely on one"
    yield f"- License: {options.license}{unsaid if options.license == 'unknown' else ''}"
    if trained.weights != "trained":
        yield f"- Weights: the moving average of the trained ones ({trained.weights})"


def _data(trained: Trained) -> Iterator[str]:
    manifest, spec = trained.manifest, trained.spec
    for source in spec.data.train:
        yield f"- Trained on: {', '.join(map(_ending, source.paths))}"
    if isinstance(spec.data.validation, tuple):
        for source in spec.data.validation:
            yield f"- Held out: {', '.join(map(_ending, source.paths))}"
    validation = manifest.validation
    account, _ = caught(lambda: load_account(trained.run))
    files = f" from {manifest.num_source_files:,} files" if manifest.num_source_files else ""
    yield f"- Records read: {manifest.num_records:,}{files}; unreadable: {manifest.num_bad:,}"
    for reason, count in sorted(manifest.dropped.items()):
        yield f"- Documents left out: {count:,} ({reason})"
    if not manifest.dropped:
        yield "- Documents left out: none"
    train = manifest.train
    yield f"- Documents trained on: {train.num_documents:,} in {train.num_rows:,} rows"
    if validation is not None:
        yield f"- Documents held out: {validation.num_documents:,} in {validation.num_rows:,} rows"
    else:
        yield "- Documents held out: none"
    if manifest.num_contradicting:
        yield f"- Documents whose text has another label elsewhere: {manifest.num_contradicting:,}"
    lost = manifest.packing.num_truncated_documents
    if lost:
        tokens = manifest.packing.num_truncated_tokens
        yield f"- Longer than a row: {lost:,} documents, which lost {tokens:,} tokens"
    damaged = [item for item in (account or {}).get("unreadable", ()) if item["is_damaged"]]
    if damaged:
        names = ", ".join(_ending(item["path"]) for item in damaged[:5])
        yield f"- Damaged files: {len(damaged)} ({names})"
    yield f"- Corpus: `{manifest.key}`"


def _ending(path: str) -> str:
    """The end of a path: enough to know a file by, without where it lay."""
    return _quoted("/".join(path.rstrip("/").split("/")[-2:]))


def _quoted(name: str) -> str:
    """A name as code: names come from data, and must not become anything else of the page."""
    return f"`{visible(name).replace('`', chr(39)).replace(chr(10), ' ')[:200]}`"


def _measured(trained: Trained) -> Iterator[str]:
    yield from _validated(trained)
    for data, measured in trained.run.evaluations(trained.checkpoint.step):
        values = {name: measured.get(name) for name in trained.task.metrics}
        rows = f"{measured['num_rows']:,}"
        what = f"rows of {', '.join(data)}" if data else "held-out rows"
        yield f"\nOn {rows} {what}, for its release:\n"
        yield from _metrics(values)


def _metrics(values: Mapping[str, float | None]) -> Iterator[str]:
    yield "| metric | value |"
    yield "|---|---|"
    for name, value in sorted(values.items()):
        shown = "undefined on these rows" if value is None else f"{value:.6g}"
        yield f"| {name} | {shown} |"


def _validated(trained: Trained) -> Iterator[str]:
    values = trained.checkpoint.metrics
    validation = trained.manifest.validation
    if not values or validation is None:
        yield "Nothing was measured at this step."
        return
    most = trained.spec.validation.max_rows
    rows = min(validation.num_rows, most) if most else validation.num_rows
    yield f"On {rows:,} held-out rows, at this step, with the trained weights:\n"
    yield from _metrics(values)


def _training(trained: Trained) -> Iterator[str]:
    spec, run, step = trained.spec, trained.run, trained.checkpoint.step
    plan, _ = caught(run.plan)
    rows, _ = caught(lambda: [row for row in run.metrics() if row["step"] <= step])
    last = rows[-1] if rows else {}
    planned = (plan or {}).get("num_steps")
    yield f"- Steps: {step:,}{f' of {planned:,}' if planned else ''}"
    if last.get("tokens"):
        yield f"- Tokens: {int(last['tokens']):,}"
    yield f"- Global batch: {spec.batch.global_rows:,} rows"
    yield (
        f"- Optimiser: {spec.optimizer.name}, learning rate {spec.optimizer.learning_rate:g} "
        f"({spec.schedule.name})"
    )
    yield f"- Precision: {(plan or {}).get('precision') or spec.precision}"
    stage = (plan or {}).get("zero_stage", spec.zero.stage)
    ranks = f" on {last['num_ranks']} ranks" if last.get("num_ranks") else ""
    yield f"- ZeRO stage: {stage}{ranks}"
    yield f"- Seed: {spec.seed}"
    yield f"- Attempts: {len(run.attempts())}"
    if spec.adapters is not None:
        how = ", merged into the weights" if trained.adapters is None else ""
        yield f"- Adapters: {spec.adapters.name}{how}"
    if spec.freezing is not None:
        yield "- Some of the layers were frozen"
    if (privacy := privacy_of(run, step)) is not None:
        yield f"- Differential privacy: {describe_privacy(privacy)}"


def _lineage(trained: Trained) -> Iterator[str]:
    """What led here, the run itself first."""
    run, spec = trained.run, trained.spec
    yield f"run `{run.name}`, step {trained.checkpoint.step}, fingerprint `{run.fingerprint}`"
    for name in trained.chosen.others:
        yield f"with the adapters of run `{name}`"
    if not trained.chosen.own:
        yield "without the adapters that the run has trained"
    seen = {run.name}
    while len(seen) < _MOST_ORIGINS:
        if trial := parse_trial_name(run.name):
            yield f"`{run.name}` is trial {trial[1]} of sweep `{trial[0]}`"
        parent, line = _parent(run, spec.model.path)
        yield line
        if parent is None or parent in seen:
            return
        seen.add(parent)
        found = Run.find(trained.run.storage, parent)
        if found is None:
            yield f"run `{parent}` is no longer there"
            return
        run, spec = found, found.spec()


def _parent(run: Run, path: str | None) -> tuple[str | None, str]:
    """The run that a run began from, if it was one, and what it began from in words."""
    origin = run.record().get("origin")
    if origin:
        return str(origin["run"]), (
            f"a fork of run `{origin['run']}` at step {origin['step']}, fingerprint "
            f"`{origin['fingerprint']}`"
        )
    kept = (run.model() or {}).get("pretrained")
    if not kept:
        return None, f"`{run.name}` began with weights drawn from its seed"
    if "run" in kept:
        return str(kept["run"]), (
            f"`{run.name}` began with the weights of run `{kept['run']}` at step {kept['step']}, "
            f"checkpoint manifest sha256 `{kept['digest']}`"
        )
    place = _ending(str(path)) if path else "a folder"
    return None, f"`{run.name}` began with the weights of {place}, sha256 `{kept['digest']}`"


def _proofs(identity: Identity, written: Written) -> Iterator[str]:
    yield f"- Fingerprint of the spec: `{identity.fingerprint}`"
    yield (
        f"- Weights of the checkpoint: sha256 `{identity.weights_sha256}`, as `dray verify "
        f"{identity.run} --step {identity.step}` prints it"
    )
    if identity.ledger_digest:
        yield (
            f"- Ledger, the chained digest of the rows of all its steps: `{identity.ledger_digest}`"
        )
    for check in written.checks:
        yield f"- Checked: {_describe(check.to_json())}"
    yield "- `dray verify DIR` compares this folder with `dray-manifest.json`"
    yield f"- Made by dray {__version__}"


def _describe(check: Mapping[str, Any]) -> str:
    text = str(check["what"])
    if "largest_difference" in check:
        text += f": the largest difference of a logit is {check['largest_difference']:.3g}"
    if "allowed" in check:
        text += f" ({check['allowed']:g} would have been refused)"
    if "same" in check:
        text += f": {'the same' if check['same'] else 'NOT the same'}"
    return text


def _limits(trained: Trained, options: Options) -> Iterator[str]:
    yield (
        "- It was measured on held-out rows of its own data; of other data nothing is known, nor "
        "of what it does to people."
    )
    if trained.spec.task.generates:
        yield "- It writes what is likely after its data, true or not."
    normal = trained.spec.data.cleaning.normalize
    if trained.spec.task.tokenizes and normal != "none":
        inside = options.form == "gguf"
        yield f"- Texts were in Unicode's {normal}" + (
            "; a GGUF file cannot say so: bring texts into that form first."
            if inside
            else ", and its tokeniser brings them there."
        )
    if options.license == "unknown":
        yield "- No licence was given: `dray export --license` names one."


def told_of(identity: Identity, written: Written, options: Options) -> dict[str, Any]:
    """What a manifest says besides its files."""
    checks: Sequence[dict[str, Any]] = [check.to_json() for check in written.checks]
    return {
        **options.told(),
        "dray": __version__,
        **identity.to_json(),
        "checks": checks,
    }
