"""Metrics of a run's checkpoint on its validation rows, or on other data prepared with the run's own tokeniser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dray.corpus.prepare import Corpus, prepare
from dray.corpus.stream import read_rows
from dray.errors import CorpusError, SpecError
from dray.order import Ints
from dray.spec import Spec, make_spec
from dray.tasks import build_task
from dray.tasks.causal_lm import bits_per_byte
from dray.trained import Trained, load_trained
from dray.yaml_reading import BadYaml, read_yaml

ROWS_PER_BATCH = 16


def evaluate(storage: str, name: str, *, data: Sequence[str] | None = None, step: str | int | None = None,
             address: str | None = None, verbose: bool = False) -> dict[str, Any]:
    """Metrics by name, with `step` and `num_rows`.

    `data`: paths, or YAML mappings like a spec's data source; none: the run's validation rows.
    Raises UserError for data that cannot be evaluated.
    """
    trained = load_trained(storage, name, step)
    if data:
        corpus = _prepare_other(trained, data, storage, address, verbose)
        split = corpus.manifest.train
    else:
        corpus, validation = Corpus(trained.corpus, trained.manifest), trained.manifest.validation
        if validation is None:
            raise CorpusError(f"run {name!r}", "has no validation rows", way_out="name data with --data")
        split = validation
    values = measure(trained, corpus, split)
    return {"run": name, "step": trained.checkpoint.step, "num_rows": split.num_rows, **values}


@torch.no_grad()
def measure(trained: Trained, corpus: Corpus, split: Any) -> dict[str, float]:
    """The task's metrics of a model over all rows of a split, in this process."""
    import numpy as np

    task = build_task(trained.spec, trained.manifest)
    metrics = task.new_metrics()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trained.model.to(device)
    for start in range(0, split.num_rows, ROWS_PER_BATCH):
        ids: Ints = np.arange(start, min(start + ROWS_PER_BATCH, split.num_rows), dtype=np.int64)
        batch = task.collate(read_rows(corpus.folder, corpus.manifest, split, ids))
        _, output = task.loss_sum(model, {key: tensor.to(device) for key, tensor in batch.items()}, 0.0)
        metrics.update(batch, output)
    values: dict[str, float] = metrics.compute()
    if trained.spec.packs_rows:
        values["bits_per_byte"] = bits_per_byte(values["loss"], split.num_tokens, split.num_text_bytes)
    return values


def _prepare_other(trained: Trained, data: Sequence[str], storage: str, address: str | None, verbose: bool) -> Corpus:
    """Rows of other documents: the run's own settings, but nothing deduplicated or held out."""
    from dray.cluster import connect
    from dray.progress import Display

    spec = make_evaluation_spec(trained.spec, data, trained.tokenizer_folder)
    with connect(address, num_cpus=1, verbose=verbose):
        corpus = prepare(spec, storage, Display().say)
    labels = corpus.manifest.labels
    if not set(labels) <= set(trained.manifest.labels):
        raise CorpusError("--data", f"labels {', '.join(labels)}",
                          f"the model knows {', '.join(trained.manifest.labels)}")
    if labels != trained.manifest.labels:
        raise CorpusError("--data", f"has only the labels {', '.join(labels)}", "every class of the model must occur")
    return corpus


def make_evaluation_spec(spec: Spec, data: Sequence[str], tokenizer_folder: str) -> Spec:
    """The spec whose training documents are the data to evaluate. A plain path keeps the first source's columns."""
    first = spec.data.train[0].model_dump(mode="json", exclude={"path", "weight", "exclude", "format"})
    sources = []
    for text in data:
        try:
            value = read_yaml(text)
        except BadYaml as error:
            if text.startswith("{"):
                raise SpecError("--data", f"{text!r}: {error}", "a mapping is YAML") from error
            value = text
        if not isinstance(value, (str, dict)):
            raise SpecError("--data", f"{text!r} is neither a path nor a mapping",
                            way_out="e.g. '{path: test.tsv, header: false}'")
        sources.append(first | ({"path": text} if isinstance(value, str) else value))
    tree = spec.model_dump(mode="json")
    cleaning = tree["data"]["cleaning"] | {"deduplicate": "none"}
    tree["data"] |= {"train": sources, "validation": None, "cleaning": cleaning}
    tree["tokenizer"] = {"path": tokenizer_folder}
    return make_spec(tree, "--data")
