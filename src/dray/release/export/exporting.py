"""The way that every export goes: refuse what cannot be, write in a staging folder, check,
describe, list, sign, and only then let the folder appear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dray.corpus.tokenizer_folder import dressed
from dray.corpus.tokenizing import read_tokenizer_files
from dray.errors import SpecError, StoreError
from dray.models.adapters import merge
from dray.models.build import num_parameters
from dray.release.export.card import CARD, Identity, make_card, told_of
from dray.release.export.folder import FORM as FOLDER
from dray.release.export.forms import Form, Options, check_options
from dray.release.export.gguf import FORM as GGUF
from dray.release.export.manifest import write_manifest
from dray.release.export.onnx import FORM as ONNX
from dray.release.export.signing import load_signer
from dray.release.export.staging import check_free, check_room, staged
from dray.release.exported import write_origin
from dray.release.trained import Chosen, Trained, Weights, open_trained
from dray.runs import CheckpointReader
from dray.runs.checkpoint_reader import hash_weights
from dray.spec import Spec
from dray.storage.filesystem import is_local

__all__ = ["Options", "export", "write_export"]

_FORMS: dict[str, Form] = {"folder": FOLDER, "onnx": ONNX, "gguf": GGUF}


def check_suits(options: Options, spec: Spec) -> None:
    """Raise SpecError for a form that no run of a spec can be exported in, as far as the spec says
    what its model is."""
    check_options(options)
    _FORMS[options.form].suits(spec)


def export(
    storage: str,
    name: str,
    folder: str,
    *,
    step: str | int | None = None,
    weights: Weights = "trained",
    chosen: Chosen = Chosen(),  # noqa: B008 - frozen
    adapters_alone: bool = False,
    form: str = "folder",
    values: str = "f16",
    license: str = "unknown",
    key_file: str | None = None,
    say: Callable[[str], None] | None = None,
) -> int:
    """Write a run's model as a folder, and return the step it holds.

    Adapters become a part of the weights, which SpecError says of those that cannot; with
    `adapters_alone` they are written without their base, as peft reads them. `form`, `values`,
    `license`, `key_file`: see `Options`. `say` is told what was checked, and of what others'
    loading of the folder would do otherwise than training did. Raises StoreError if the folder is
    there and not empty, and UserError for what cannot be exported; nothing is left of it then.
    """
    options = Options(form, adapters_alone, values, license, key_file)
    check_options(options)
    check_free(folder)
    return write_export(
        open_trained(storage, name, step, weights, chosen, unpacked=True), folder, options, say=say
    )


def write_export(
    trained: Trained,
    folder: str,
    options: Options = Options(),  # noqa: B008 - frozen
    *,
    say: Callable[[str], None] | None = None,
) -> int:
    """As `export`, of a model that was opened. Its adapters are merged in place."""
    check_options(options)
    form = _FORMS[options.form]
    target = check_free(folder)
    run = trained.run
    if is_local(run.filesystem) and target.is_relative_to(Path(run.path).resolve()):
        raise StoreError(
            folder,
            f"lies in the folder of run {run.name!r}",
            "what a run keeps is its own",
            "choose another folder",
        )
    signer = load_signer(options.key_file) if options.key_file else None
    _check_adapters(trained, options)
    form.check(trained, options)
    with staged(folder, target) as staging:
        model = trained.model
        check_room(folder, target, int(4 * num_parameters(model) * form.copies))
        if not options.adapters_alone and hasattr(model, "dray_adapted"):
            merge(model)
        identity = identify(trained)
        _write_tokenizer(trained, staging)
        written = form.write(trained, staging, options)
        trained.spec.task.save_processor(str(staging))
        if options.form == "folder" and not options.adapters_alone:
            write_origin(trained.spec, trained.manifest, staging)
        card = make_card(trained, identity, written, options)
        (staging / CARD).write_text(card, encoding="utf-8")
        write_manifest(staging, told_of(identity, written, options), signer)
    for check in written.checks if say else ():
        if check.largest_difference is not None:
            say(f"{folder}: {check.what}: {check.largest_difference:.3g} at most")  # type: ignore[misc]
    for remark in written.remarks if say else ():
        say(f"{folder}: {remark}")  # type: ignore[misc]
    return trained.checkpoint.step


def _check_adapters(trained: Trained, options: Options) -> None:
    """Raise SpecError for adapters that can be neither a part of the weights nor alone, as the
    export wants them."""
    adapters = trained.adapters
    if adapters is None:
        return
    in_peft = "peft" in adapters.packages
    keep = "keep the run: `dray evaluate`, `predict` and `generate` read it"
    if options.adapters_alone and not in_peft:
        raise SpecError(
            f"adapters.name = {adapters.name}",
            "peft has no such adapters",
            "what is written is for peft's own loading",
            keep,
        )
    if not options.adapters_alone and not adapters.merges:
        raise SpecError(
            f"adapters.name = {adapters.name}",
            "cannot be merged",
            "they change what goes through a model, not its weights",
            "write them alone: --adapters" if in_peft else keep,
        )


def identify(trained: Trained) -> Identity:
    """What an export of it is of; reads the whole checkpoint."""
    run, info = trained.run, trained.checkpoint
    with run.hold(info), CheckpointReader(run, info) as reader:
        chain = reader.metadata.get("rows_chain") or {}
        digest = hash_weights(reader)
    return Identity(
        run.name,
        info.step,
        info.attempt,
        run.fingerprint,
        trained.weights,
        digest,
        str(chain.get("digest") or ""),
    )


def _write_tokenizer(trained: Trained, folder: Path) -> None:
    """The run's tokeniser as an export wants it; nothing for tasks without one."""
    if not trained.spec.task.tokenizes:
        return
    files = read_tokenizer_files(trained.tokenizer_folder)
    for name, content in dressed(files, trained.dress).items():
        (folder / name).write_bytes(content)
