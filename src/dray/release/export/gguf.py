"""GGUF files, for llama.cpp and what is built on it: a decoder's weights, its configuration, its
tokeniser and its chat template in one file.

The only file that knows the gguf library. What transformers reads back of a file is compared with
what was written, tensor by tensor, and its logits with the trained model's. Architectures whose
files it does not read back as they were are refused, and so are tokenisers that the format has no
name for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dray.corpus.tokenizer_folder import TOKENIZER_JSON, read_json
from dray.corpus.tokenizing import PROBES, read_tokenizer_files
from dray.errors import SpecError, caught, one_line, translated
from dray.release.export.forms import Check, Form, Options, Written
from dray.release.export.loading import gguf_code
from dray.release.export.texts import text_rows
from dray.release.trained import Trained
from dray.spec import Spec

FILE = "model.gguf"
ALLOWED = 1e-3
"""Of a logit, where the file's reader has the trained weights."""
_BLOCK = 32
"""Numbers of a row that share a scale in Q8_0."""
Config = Mapping[str, Any]
Turn = Callable[[Any], Any]


@dataclass(frozen=True)
class _Layout:
    """How an architecture's weights lie in a file."""

    name: str
    """What the format calls it."""
    fixed: Mapping[str, Any]
    """Fields of its configuration that a file cannot say, with the one value that its readers
    take."""
    turned: Callable[[str, Config, Any], Any]
    """A tensor as the file has it, by its name in transformers."""


def _as_it_is(name: str, config: Config, tensor: Any) -> Any:
    return tensor


def _permuted(name: str, config: Config, tensor: Any) -> Any:
    """llama.cpp turns neighbouring pairs of a head's numbers where transformers turns its
    halves."""
    if name.endswith("q_proj.weight"):
        heads = config["num_attention_heads"]
    elif name.endswith("k_proj.weight"):
        heads = config["num_key_value_heads"]
    else:
        return tensor
    rows, width = tensor.shape
    return tensor.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def _transposed(name: str, config: Config, tensor: Any) -> Any:
    """GPT-2's matrices are stored the other way round than those of all others."""
    is_one = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return tensor.T if is_one else tensor


_PLAIN = {"hidden_act": "silu", "mlp_bias": False, "attention_bias": False}
_LAYOUTS = {
    "llama": _Layout("llama", _PLAIN, _permuted),
    "mistral": _Layout("llama", {"hidden_act": "silu", "sliding_window": None}, _permuted),
    "qwen2": _Layout("qwen2", {"hidden_act": "silu", "use_sliding_window": False}, _as_it_is),
    "qwen3": _Layout("qwen3", {**_PLAIN, "use_sliding_window": False, "head_dim": 128}, _as_it_is),
    "gpt2": _Layout(
        "gpt2",
        {"activation_function": "gelu_new", "n_positions": 1024, "scale_attn_weights": True},
        _transposed,
    ),
}
"""By transformers' model types. A test writes each and reads it back."""


def _check(trained: Trained, options: Options) -> None:
    _suits(trained.spec)
    config = (trained.run.model() or {}).get("config") or trained.model.config.to_dict()
    _check_config(config)
    _splitting(_tokenizer_tree(trained))


def _suits(spec: Spec) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise SpecError(
            "--format gguf",
            "the gguf library cannot be imported",
            "it writes the file",
            "pip install 'dray[gguf]'",
        )
    task = spec.task
    if task.head.auto_class != "AutoModelForCausalLM" or task.whole_words:
        raise SpecError(
            "--format gguf",
            f"holds no model of {task.name}",
            "GGUF files are for models that write text",
            "export a folder, or --format onnx",
        )
    if spec.model.architecture is not None:
        _check_kind(spec.model.architecture)


def _check_kind(kind: str) -> None:
    if kind not in _LAYOUTS:
        raise SpecError(
            "--format gguf",
            f"{kind} cannot be written",
            f"files of {', '.join(_LAYOUTS)} are read back as they were",
            "export a folder, or --format onnx",
        )


def _check_config(config: Config) -> None:
    """Raise SpecError for an architecture, or a kind of one, that is not read back as it was."""
    kind = str(config.get("model_type"))
    _check_kind(kind)
    found = {name: config.get(name) for name in _LAYOUTS[kind].fixed}
    rope = config.get("rope_parameters") or {}
    wrong = {
        f"{name} = {found[name]}": wanted
        for name, wanted in _LAYOUTS[kind].fixed.items()
        if found[name] is not None and found[name] != wanted
    }
    if rope.get("rope_type", "default") != "default":
        wrong[f"rope_type = {rope['rope_type']}"] = "default"
    if wrong:
        what, wanted = next(iter(wrong.items()))
        raise SpecError(
            "--format gguf",
            f"{kind} with {what} cannot be written",
            f"a file cannot say so, and its readers take {wanted}",
            "export a folder, or --format onnx",
        )


def _write(trained: Trained, folder: Path, options: Options) -> Written:
    import gguf

    model = trained.model.cpu().float().eval()
    config = model.config.to_dict()
    _check_config(config)
    layout, kind = _LAYOUTS[config["model_type"]], gguf.GGMLQuantizationType[options.values.upper()]
    writer = gguf.GGUFWriter(folder / FILE, layout.name)
    _add_config(writer, config, trained, kind)
    _add_tokenizer(writer, trained, config)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.name),
        config["num_hidden_layers"] if "num_hidden_layers" in config else config["n_layer"],
    )
    kept = 0
    for name, tensor in _once(model):
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise SpecError(
                "--format gguf",
                f"the format has no name for {name}",
                way_out="export a folder, or --format onnx",
            )
        array = np.ascontiguousarray(layout.turned(name, config, tensor.numpy()))
        held = _held_as(array, kind)
        kept += held != kind and array.ndim > 1
        writer.add_tensor(place, gguf.quants.quantize(array, held), raw_dtype=held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.config.save_pretrained(folder)
    remarks = list(_tokenizer_remarks(trained, folder))
    if kept:
        remarks.append(
            f"{kept} matrices are held as f16: {options.values} takes rows of a multiple of "
            f"{_BLOCK} numbers"
        )
    return Written(
        _compare(trained, folder, layout, kind, options),
        "transformers",
        gguf_code(trained, FILE),
        tuple(remarks),
    )


FORM = Form(_check, _write, 1.2, _suits)


def _once(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's tensors by name, tied ones once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            yield name, tensor.detach()


def _held_as(array: Any, kind: Any) -> Any:
    """How a tensor is held: vectors as they are, since they are small and weigh much."""
    import gguf

    types = gguf.GGMLQuantizationType
    if array.ndim < 2:
        return types.F32
    return types.F16 if kind == types.Q8_0 and array.shape[-1] % _BLOCK else kind


def _add_config(writer: Any, config: Config, trained: Trained, kind: Any) -> None:
    """What the format says of a model: its sizes, and where it comes from."""
    import gguf

    def one(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    heads, width = one("num_attention_heads", "n_head"), one("hidden_size", "n_embd")
    rope = config.get("rope_parameters") or {}
    # transformers takes a llama that is called nothing but mistral for something else.
    called = f"{trained.run.name}, step {trained.checkpoint.step}"
    values = [
        (writer.add_name, called),
        (writer.add_context_length, one("max_position_embeddings", "n_positions")),
        (writer.add_embedding_length, width),
        (writer.add_block_count, one("num_hidden_layers", "n_layer")),
        (writer.add_feed_forward_length, one("intermediate_size", "n_inner") or 4 * width),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, one("num_key_value_heads") or heads),
        (writer.add_layer_norm_rms_eps, one("rms_norm_eps")),
        (writer.add_layer_norm_eps, one("layer_norm_epsilon")),
        (writer.add_rope_freq_base, rope.get("rope_theta", one("rope_theta"))),
        (writer.add_vocab_size, one("vocab_size")),
    ]
    if rope:
        size = one("head_dim") or width // heads
        values += [
            (writer.add_rope_dimension_count, size),
            (writer.add_key_length, size),
            (writer.add_value_length, size),
        ]
    for add, value in values:
        if value is not None:
            add(value)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind.name]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


_FILE_TYPES = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
}


# ---- the tokeniser -----------------------------------------------------------------------------


def _tokenizer_tree(trained: Trained) -> dict[str, Any]:
    return read_json(read_tokenizer_files(trained.tokenizer_folder), TOKENIZER_JSON)


def _splitting(tree: Mapping[str, Any]) -> str:
    """What the format calls the way that a byte-level tokeniser splits texts. Raises SpecError for
    one that it has no name for."""
    model, steps = tree.get("model") or {}, tree.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps]) if steps else []
    kinds = [step.get("type") for step in steps]
    plain = bool(kinds) and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space")
    if model.get("type") == "BPE" and plain:
        by_regex = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and by_regex:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and by_regex and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not by_regex and not steps[0].get("invert"):
            return _known_split(str((steps[0].get("pattern") or {}).get("Regex")))
    told = f"{model.get('type')} after {', '.join(map(str, kinds)) or 'nothing'}"
    raise SpecError(
        "--format gguf",
        f"its tokeniser ({told}) cannot be written",
        "the format names ways to split texts for byte-level BPE: GPT-2's, SmolLM's, Llama 3's, "
        "Qwen2's",
        "export a folder, or --format onnx",
    )


def _known_split(regex: str) -> str:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for name in ("llama-bpe", "qwen2", "tekken", "gpt-4o"):
        if GGUF_PRE_TOKENIZER_SPLITS.get(name) == regex:
            return name
    raise SpecError(
        "--format gguf",
        "its tokeniser splits texts by an expression of its own",
        "the format knows some by name, and no other",
        "export a folder, or --format onnx",
    )


def _add_tokenizer(writer: Any, trained: Trained, config: Config) -> None:
    import gguf

    tree = _tokenizer_tree(trained)
    tokens = {number: token for token, number in tree["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in tree.get("added_tokens") or ():
        tokens[added["id"]] = added["content"]
        types[added["id"]] = (
            gguf.TokenType.CONTROL if added.get("special") else gguf.TokenType.USER_DEFINED
        )
    size = int(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(tree))
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([types.get(number, gguf.TokenType.UNUSED) for number in range(size)])
    merges = tree["model"].get("merges") or ()
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    prefix = trained.dress.prefix
    if len(prefix) == 1:
        writer.add_bos_token_id(prefix[0])
    writer.add_add_bos_token(len(prefix) == 1)
    writer.add_add_eos_token(False)
    if trained.manifest.eos_token_id is not None:
        writer.add_eos_token_id(trained.manifest.eos_token_id)
    if trained.manifest.pad_token_id is not None:
        writer.add_pad_token_id(trained.manifest.pad_token_id)
    if trained.tools.chat_template:
        writer.add_chat_template(trained.tools.chat_template)


def _tokenizer_remarks(trained: Trained, folder: Path) -> Iterator[str]:
    from transformers import AutoTokenizer

    def tokenise() -> list[list[int]]:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE, local_files_only=True)
        return [list(tokenizer(text, verbose=False).input_ids) for text in PROBES]

    theirs, error = caught(tokenise)
    if error is not None:
        yield f"transformers cannot read the tokeniser inside the file ({one_line(error)[:200]})"
    elif theirs != [trained.encode(text) for text in PROBES]:
        yield (
            "transformers reads the tokeniser inside the file otherwise than training did; the "
            "tokeniser's own files lie beside it: leave gguf_file out for the tokeniser"
        )


# ---- reading it back ---------------------------------------------------------------------------


def _compare(
    trained: Trained, folder: Path, layout: _Layout, kind: Any, options: Options
) -> tuple[Check, ...]:
    """What transformers makes of the file, against what was meant. Raises SpecError."""
    model = trained.model
    with translated(
        lambda error: _differs(f"transformers cannot read it back ({one_line(error)[:300]})")
    ):
        other = _read_back(folder)
    config = model.config.to_dict()
    read = dict(other.state_dict())
    for name, tensor in _once(model):
        turned = partial(layout.turned, name, config)
        if name not in read or not _is_as_written(read[name], tensor, turned, kind):
            raise _differs(f"{name} is read back as something else")
    batches = list(_some_rows(trained))
    wanted = [_logits(model, ids) for ids in batches]
    rounded = _largest(wanted, [_logits(other, ids) for ids in batches])
    scale = max(float(logits.abs().max()) for logits in wanted)
    other.load_state_dict(model.state_dict(), strict=False)
    exact = _largest(wanted, [_logits(other, ids) for ids in batches])
    if not exact <= ALLOWED:
        raise _differs(f"what is read back gives other logits, by {exact:.3g}")
    shapes = {"shapes": [list(ids.shape) for ids in batches]}
    return (
        Check(
            "the file as transformers reads it, with the trained weights", exact, ALLOWED, shapes
        ),
        Check(
            f"the file's own numbers ({options.values}) against the trained ones",
            rounded,
            None,
            {**shapes, "largest_logit": scale},
        ),
    )


def _read_back(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):
            return AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=FILE, dtype=torch.float32, local_files_only=True
            ).eval()
    finally:
        if shows:
            logging.enable_progress_bar()


def _is_as_written(read: torch.Tensor, meant: torch.Tensor, turned: Turn, kind: Any) -> bool:
    """Whether a tensor that was read is the one that was meant, in the numbers that a file of that
    kind has."""
    import gguf

    if read.shape != meant.shape:
        return False
    array = np.ascontiguousarray(turned(meant.numpy()))
    held = _held_as(array, kind)
    expected = gguf.quants.dequantize(gguf.quants.quantize(array, held), held)
    found = turned(read.float().numpy())
    return bool(np.array_equal(found, np.asarray(expected).reshape(array.shape)))


def _some_rows(trained: Trained) -> Iterator[torch.Tensor]:
    longest = min(trained.longest_row or 256, 256)
    for shape in ((1, min(5, longest)), (3, min(33, longest)), (1, longest)):
        rows = text_rows(trained, *shape)
        assert rows is not None  # its tokens are pieces of text, or it has been refused
        yield rows


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found.float()


def _largest(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True))


def _differs(what: str) -> SpecError:
    return SpecError(
        "--format gguf",
        what,
        "a file that is read back otherwise than it was written is not kept",
        "export a folder, or --format onnx",
    )
