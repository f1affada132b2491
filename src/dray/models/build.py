"""A live model from a spec: constructed without random numbers, then initialised or loaded one
module at a time.

DeepSpeed is not known here: where parameters lie and in which precision is decided by two context
managers that come in as arguments. Under ZeRO-3's no rank ever holds the whole model, under those
of the other stages none in fp32 besides.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import nn

from dray.errors import SpecError, caught, one_line, translated
from dray.models.adapters import adapt
from dray.models.config import auto_class, make_config
from dray.models.cutting import make_thin
from dray.models.folder import FolderWeights
from dray.models.freezing import freeze, keep_as_base, with_depths
from dray.models.groups import find_blocks, hidden_matrices
from dray.models.initialize import (
    Gathering,
    initialize_weights,
    no_gathering,
    restore_rotary_buffers,
)
from dray.models.shared_norm import share_batch_norms
from dray.models.source import find_folder
from dray.models.weights import Weights, load_weights
from dray.models.width import scale_initial_weights, width_factor
from dray.processes.imports import first_import
from dray.spec import Head, Spec

logger = logging.getLogger("dray.models")


def import_transformers() -> None:
    """Import what every model needs of transformers."""
    with _leanly():
        # The second one is half of all its imports, and comes with the first model: a fork would
        # import it by itself.
        for name in ("transformers.initialization", "transformers.modeling_utils"):
            import_module(name)
        import_module("transformers.models.auto.modeling_auto")


def _leanly() -> AbstractContextManager[None]:
    return first_import("transformers", without=("scipy", "sklearn"))


class Sizing(Protocol):
    """What a model takes its sizes of: a corpus' manifest, or what a task knows of it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def labels(self) -> Sequence[str]: ...

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...


def sizes_by(corpus: Sizing, num_labels: int) -> dict[str, Any]:
    """The arguments of `build_model` that a corpus decides."""
    return {
        "vocab_size": corpus.vocab_size,
        "num_labels": num_labels,
        "labels": corpus.labels,
        "pad_token_id": corpus.pad_token_id,
        "eos_token_id": corpus.eos_token_id,
    }


def build_model(
    spec: Spec,
    *,
    vocab_size: int,
    num_labels: int = 2,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
    labels: Sequence[str] = (),
    constructing: AbstractContextManager[Any] | None = None,
    gathering: Gathering = no_gathering,
    initial_weights: bool = True,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
    num_blocks: int | None = None,
    adapted: bool = True,
) -> Any:
    """The spec's model for the spec's task: a transformers PreTrainedModel on the CPU, or where
    `constructing` puts it.

    `vocab_size` and the token ids are the tokeniser's. `constructing` is entered around the
    constructor, `gathering` around parameters while their values are set (ZeRO-3:
    `deepspeed.zero.Init` and `GatheredParameters(…, modifier_rank=0)`). Without `initial_weights`
    the parameters are left as they come from the allocator, for a restore to fill. `config` and
    `weights`: what the run keeps of its model (`make_config`), and what it starts from; without
    them the spec's own folder is looked for. What became of weights is logged, and kept as
    `model.load_report`. `num_blocks`: a thin copy for measurements, with so many blocks and
    drawn weights. Without `adapted` it is as it was before the spec's adapters came into it. Raises
    SpecError.
    """
    with _leanly():
        made = make_config(
            spec,
            vocab_size=vocab_size,
            num_labels=num_labels,
            pad_token_id=pad_token_id,
            eos_token_id=eos_token_id,
            labels=labels,
            kept=config,
        )
        if num_blocks is not None:
            make_thin(made, num_blocks)
        model = _construct(made, spec.task.head, constructing or nullcontext(), dtype)
    if not initial_weights:
        model.tie_weights()
        restore_rotary_buffers(model)
    elif not spec.model.origin or num_blocks is not None:
        initialize_weights(model, spec.seed, gathering)
        scale_initial_weights(model, width_factor(spec), gathering)
    else:
        weights = weights or FolderWeights(find_folder(str(spec.model.path)))
        report = load_weights(model, weights, spec.seed, gathering)
        model.load_report = report
        logger.info("%s", report)
    return fit_to_train(model, spec, gathering) if adapted else model


def fit_to_train(model: Any, spec: Spec, gathering: Gathering = no_gathering) -> Any:
    """Put the spec's adapters into a model, or what its task adds, or freeze what it says of its
    layers, before it is trained; returns it. Raises SpecError."""
    if spec.task.adds:
        keep_as_base(model.parameters())
        digest = hashlib.sha256(f"{spec.seed}:part".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            spec.task.add_part(model)
        return model
    if spec.adapters is not None:
        return adapt(model, spec, gathering=gathering)
    if spec.freezing is not None:
        freeze(model, spec.freezing)
    return model


Contexts = Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]


def enable_activation_checkpointing(model: Any, contexts: Contexts | None = None) -> None:
    """Recompute each block's activations in the backward pass instead of keeping them. `contexts`:
    what a block is computed in the first time, and the second time."""
    options: dict[str, Any] = {"use_reentrant": False}
    if contexts is not None:
        options["context_fn"] = contexts
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def compile_model(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the blocks, each by itself: they are alike, so the code of the first serves all, and
    a model of any depth is compiled in the time of one block. A model without blocks is compiled
    whole."""
    for part in find_blocks(model) or [model]:
        part.compile(backend=backend)


@contextmanager
def one_document_a_row() -> Iterator[None]:
    """Within this, transformers does not look whether positions begin anew within a row.

    Ours never do. It asks the device for that in each forward pass, and in a compiled model, which
    cannot ask, it makes a mask of every square of attention.
    """
    from transformers import masking_utils

    looks = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looks


@contextmanager
def documents_apart() -> Iterator[None]:
    """Within this, documents that are packed into a row see nothing of each other: attention stays
    within what positions count through, which begin at 0 with each document.

    As transformers does by itself, but without asking the device in each forward pass whether a row
    has more than one.
    """
    from transformers import masking_utils

    def number(position_ids: torch.Tensor) -> torch.Tensor:
        before = position_ids[:, :1] - 1
        return (torch.diff(position_ids, prepend=before, dim=-1) != 1).cumsum(-1)

    looks = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = number
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = looks


_OTHER_BLOCKS = ("linear", "mamba", "conv", "recurrent")
"""Words of the kinds of blocks that carry a state through a row, whatever positions say."""


def keeps_documents_apart(model: Any) -> bool:
    """Whether documents in a row of a model see nothing of each other within `documents_apart`: it
    takes positions, all its blocks attend, and masks of attention heed where positions begin
    anew, which is found out by asking. A test tries each architecture that is said to."""
    takes = inspect.signature(model.forward).parameters
    kinds = getattr(model.config, "layer_types", None) or ()
    carries = any(word in kind for kind in kinds for word in _OTHER_BLOCKS)
    convolves = any(isinstance(module, nn.Conv1d) for module in model.modules())
    if "position_ids" not in takes or carries or convolves:
        return False
    return _asks_for_documents(model)


def _asks_for_documents(model: Any) -> bool:
    """Whether a forward pass of the model, on the meta device, looks for documents in its rows. It
    need not come to its end: mixtures look where their tokens go, and masks are made before."""
    from transformers import masking_utils

    asked: list[bool] = []
    looks = masking_utils.find_packed_sequence_indices

    def look(position_ids: torch.Tensor) -> torch.Tensor:
        asked.append(True)
        return torch.zeros_like(position_ids)

    masking_utils.find_packed_sequence_indices = look
    ids = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    config, pad = model.config, getattr(model.config, "pad_token_id", None)
    try:
        config.pad_token_id = None  # or some ask their tokens, which are none, for padding
        with torch.no_grad():
            caught(partial(model, input_ids=ids, position_ids=ids))
    finally:
        masking_utils.find_packed_sequence_indices = looks
        config.pad_token_id = pad
    return bool(asked)


def num_parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once, partitioned ones in full."""
    return sum(
        int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in model.parameters()
    )


def check_builds(spec: Spec, config: Any) -> Any:
    """The model of a configuration on the meta device, where it holds nothing. Raises SpecError for
    a configuration that transformers takes and cannot build, or that the optimiser cannot
    update."""
    with translated(
        lambda error: SpecError(
            "model.options" if spec.model.options else "model",
            f"{config.model_type} cannot be built ({type(error).__name__}: {one_line(error)})",
            "transformers must know each value",
            "see the configuration's own documentation",
        )
    ):
        model = _construct(config, spec.task.head, torch.device("meta"), torch.float32)
    if spec.task.apart and not keeps_documents_apart(model):
        raise SpecError(
            "model",
            f"{config.model_type} lets documents that are packed into a row see each other",
            f"{spec.task.name} packs them, and each is by itself",
            "choose an architecture whose attention goes by positions, e.g. llama",
        )
    if spec.optimizer.parts_hidden:
        hidden_matrices(model)
    return model


def check_trains(model: Any, spec: Spec) -> None:
    """Make a model that was built on the meta device what is trained of it (`fit_to_train`). Raises
    SpecError for what it has not, such as targets or blocks."""
    model.tie_weights()
    fit_to_train(model, spec)
    with_depths(model, [], spec)


def _construct(
    config: Any, head: Head, constructing: AbstractContextManager[Any], dtype: torch.dtype
) -> Any:
    from transformers.initialization import no_init_weights

    kind, options = auto_class(head), {}
    if head.over == "hidden":
        model_class = kind._model_mapping[type(config)]
        if "add_pooling_layer" in inspect.signature(model_class).parameters:
            options["add_pooling_layer"] = False  # nothing would go through it, or train it
    with torch.random.fork_rng(devices=[]), no_init_weights(), constructing:
        model = kind.from_config(config, dtype=dtype, trust_remote_code=False, **options)
    share_batch_norms(model)
    return model
