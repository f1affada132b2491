"""ONNX files: the graph of what the task's model gives, in fp32, checked by onnxruntime.

torch traces it and onnxscript writes it; the only file that knows onnx. The graph computes without
a cache, takes rows and tokens of any number, and wants padding at the end of rows. What
onnxruntime computes otherwise than torch, by more than 1e-3 in any logit, is refused.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dray.errors import SpecError, one_line, translated
from dray.models.build import one_document_a_row
from dray.release.export.forms import Check, Form, Options, Written
from dray.release.export.loading import onnx_code
from dray.release.export.texts import text_rows
from dray.release.trained import Trained
from dray.spec import Spec
from dray.tasks.parts.graphs import ANSWER_IDS

if TYPE_CHECKING:
    from dray.tasks import Batch
    from dray.tasks.parts.graphs import Graph

FILE = "model.onnx"
ALLOWED = 1e-3
"""Of a logit, in fp32."""
_LONGEST = 512
"""Tokens of the longest rows that are compared."""
_MOST_INSIDE = 1_500_000_000
"""Bytes of weights in one file: protobuf ends at 2 GB, and beyond they lie beside it."""
_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


def _check(trained: Trained, options: Options) -> None:
    _suits(trained.spec)


def _suits(spec: Spec) -> None:
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise SpecError(
            "--format onnx",
            f"{', '.join(missing)} cannot be imported",
            "torch writes ONNX with them, and they check it",
            "pip install 'dray[onnx]'",
        )


def _write(trained: Trained, folder: Path, options: Options) -> Written:
    model = trained.model.cpu().float().eval()
    graph = trained.task.graph(model)
    shapes = _shapes(trained, graph)
    _trace(graph, folder / FILE, model)
    largest = _compare(trained, graph, folder / FILE, shapes)
    model.config.save_pretrained(folder)
    remarks = ["The graph has no cache: each call computes whole rows.", *trained.task.remarks]
    if "attention_mask" in graph.inputs:
        remarks.append("Rows are padded at their end, where `attention_mask` is 0.")
    check = Check(
        "onnxruntime against torch, in fp32",
        largest,
        ALLOWED,
        {"shapes": [list(shape) for shape in shapes], "output": graph.output},
    )
    return Written((check,), "onnx", onnx_code(trained, FILE, graph.inputs), tuple(remarks))


FORM = Form(_check, _write, 1.2, _suits)


def _shapes(trained: Trained, graph: Graph) -> list[tuple[int, int]]:
    """(rows, tokens) of what is compared: single rows, and several with padding, up to the longest
    that training had."""
    longest = min(trained.spec.row_tokens, trained.longest_row or _LONGEST, _LONGEST)
    usual = max(2, min(longest, 12))
    if not any("tokens" in axes for axes in graph.inputs.values()):
        return [(1, usual), (2, usual), (5, usual)]
    return sorted({(1, usual), (2, max(2, usual - 3)), (3, max(2, longest // 2)), (4, longest)})


def _trace(graph: Graph, path: Path, model: Any) -> None:
    """Write the graph. Raises SpecError for a model that cannot be traced."""
    batch = graph.draw(2, 7, torch.Generator().manual_seed(1))
    dynamic = tuple(
        {place: axis for place, axis in enumerate(axes) if isinstance(axis, str)}
        for axes in graph.inputs.values()
    )
    num_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    with (
        translated(
            lambda error: SpecError(
                "--format onnx",
                f"{type(model).__name__} cannot be traced ({type(error).__name__}: "
                f"{one_line(error)[:300]})",
                "a graph has no branches that depend on numbers",
                "export a folder: leave --format out",
            )
        ),
        _quietly(),
        one_document_a_row(),
        torch.no_grad(),
    ):
        program = torch.onnx.export(
            graph.module,
            tuple(batch[name] for name in graph.inputs),
            dynamo=True,
            dynamic_shapes=(dynamic,),
            input_names=list(graph.inputs),
            output_names=[graph.output],
            verbose=False,
        )
        assert program is not None
        program.save(path, external_data=num_bytes > _MOST_INSIDE)


def _compare(trained: Trained, graph: Graph, path: Path, shapes: list[tuple[int, int]]) -> float:
    """The largest difference of any output between onnxruntime and torch, where rows are no
    padding. Raises SpecError beyond ALLOWED."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = {given.name for given in session.get_inputs()}
    largest = 0.0
    for seed, (rows, tokens) in enumerate(shapes):
        batch = _fill(trained, graph.draw(rows, tokens, torch.Generator().manual_seed(seed)))
        with (
            translated(
                lambda error: SpecError(
                    "--format onnx",
                    f"onnxruntime cannot compute the graph ({one_line(error)[:300]})",
                    "what is exported has been run",
                    "export a folder: leave --format out",
                )
            ),
            torch.no_grad(),
        ):
            ours = graph.module(*(batch[name] for name in graph.inputs))
            inputs = {name: batch[name].numpy() for name in graph.inputs if name in taken}
            theirs = torch.from_numpy(session.run(None, inputs)[0])
        if theirs.shape != ours.shape:
            raise _differs(f"gives {list(theirs.shape)} instead of {list(ours.shape)}")
        found = float((_without_padding(ours, batch) - _without_padding(theirs, batch)).abs().max())
        largest = max(largest, found) if found == found else found  # noqa: PLR0124 - not a number
        if not largest <= ALLOWED:
            raise _differs(f"differs from torch by {largest:.3g} at {rows} rows of {tokens} tokens")
    return largest


def _fill(trained: Trained, batch: Batch) -> Batch:
    """A batch with texts in place of tokens at random, where there are such."""
    filled = dict(batch)
    for name in (name for name in ("input_ids", ANSWER_IDS) if name in batch):
        texts = text_rows(trained, *batch[name].shape)
        if texts is None:
            return batch
        mask = batch.get("attention_mask") if name == "input_ids" else None
        filled[name] = texts if mask is None else texts.where(mask == 1, batch[name])
    return filled


def _without_padding(output: torch.Tensor, batch: Batch) -> torch.Tensor:
    mask: torch.Tensor | None = batch.get("attention_mask")
    if mask is None or output.dim() < 3 or output.shape[:2] != mask.shape:
        return output
    return output[mask == 1]


def _differs(what: str) -> SpecError:
    return SpecError(
        "--format onnx",
        f"onnxruntime {what}",
        f"at most {ALLOWED:g} in any logit",
        "export a folder: leave --format out",
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's remarks on what it does and on libraries that are not there."""
    names: Mapping[str, int] = {
        name: logging.getLogger(name).level
        for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript")
    }
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in names.items():
            logging.getLogger(name).setLevel(level)
