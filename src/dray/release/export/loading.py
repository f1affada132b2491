"""How somebody loads an export, as Python that runs in its folder: what a card shows, and a test
runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dray.release.trained import Trained

_FOLDER = 'folder = "."  # where this file lies'
_TEXT = '"A text of some words."'


def folder_code(trained: Trained) -> str:
    """Of a Hugging Face folder."""
    kind = trained.spec.task.head.auto_class
    loads = [f"model = {kind}.from_pretrained(folder).eval()"]
    return _code(trained, [kind], loads)


def gguf_code(trained: Trained, file: str) -> str:
    """Of a GGUF file, as transformers reads it."""
    kind = trained.spec.task.head.auto_class
    loads = [f'model = {kind}.from_pretrained(folder, gguf_file="{file}").eval()']
    return _code(trained, [kind], loads)


def adapters_code(trained: Trained) -> str:
    """Of adapters alone, which want the model that they were trained in."""
    kind = trained.spec.task.head.auto_class
    classes = f"\nmodel = {kind}.from_pretrained(base" + (
        f", num_labels={trained.model.config.num_labels})"
        if trained.spec.task.head.over == "labels"
        else ")"
    )
    return (
        f"from peft import PeftModel\nfrom transformers import {kind}\n\n{_FOLDER}\n"
        'base = "PATH"  # of the model that they were trained in'
        f"{classes}\nmodel = PeftModel.from_pretrained(model, folder).eval()"
    )


def onnx_code(trained: Trained, file: str, inputs: Mapping[str, Any]) -> str:
    """Of an ONNX file."""
    task = trained.spec.task
    opens = f'session = onnxruntime.InferenceSession(f"{{folder}}/{file}")'
    runs = "(found,) = session.run(None, {name: batch[name] for name in names})"
    lines = ["import numpy as np", "import onnxruntime"]
    if not task.tokenizes or task.whole_words:
        made = ", ".join(
            f'"{name}": {_zeros("np", value)}' for name, value in _some_inputs(trained).items()
        )
        if "attention_mask" in inputs and task.tokenizes:
            made += ', "attention_mask": np.ones((1, 2), np.int64)'
        elif "attention_mask" in inputs:
            first = next(iter(_some_inputs(trained).values()))
            made += f', "attention_mask": np.ones({tuple(first.shape[:2])}, np.int64)'
        given = [f"batch = {{{made}}}{_made_by(trained)}"]
    else:
        lines += ["from transformers import AutoTokenizer"]
        pads = trained.manifest.pad_token_id is not None
        texts = f'[{_TEXT}, "Another one."]' if pads else f"[{_TEXT}]"
        if "token_type_ids" in inputs:
            texts = f"{texts}, {texts}, return_token_type_ids=True"
        how = "padding=True, truncation=True, " if pads else ""
        given = [
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            f'batch = dict(tokenizer({texts}, {how}return_tensors="np"))',
        ]
        if task.head.behind_encoder:
            start = getattr(trained.model.config, "decoder_start_token_id", None) or 0
            given += [
                f'batch["decoder_input_ids"] = np.full((len(batch["input_ids"]), 1), {start})'
            ]
    names = "names = [given.name for given in session.get_inputs()]"
    return "\n".join([*lines, "", _FOLDER, *given, opens, names, runs, "print(found.shape)"])


def _code(trained: Trained, kinds: list[str], loads: list[str]) -> str:
    task = trained.spec.task
    if not task.tokenizes or task.whole_words:
        made = ", ".join(
            f'"{name}": {_zeros("torch", value)}' for name, value in _some_inputs(trained).items()
        )
        uses = [f"batch = {{{made}}}{_made_by(trained)}", "print(model(**batch)[0].shape)"]
        return "\n".join(
            ["import torch", f"from transformers import {kinds[0]}", "", _FOLDER, *loads, *uses]
        )
    names = ", ".join(sorted([*kinds, "AutoTokenizer"]))
    uses = ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
    if task.converses:
        uses += [
            'batch = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}],',
            '    add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        ]
    else:
        uses += [f'batch = tokenizer({_TEXT}, return_tensors="pt")']
    if task.generates:
        uses += ["print(tokenizer.decode(model.generate(**batch, max_new_tokens=8)[0]))"]
    elif task.head.over == "labels" and trained.manifest.labels and task.head.each == "row":
        uses += ["print(model.config.id2label[int(model(**batch).logits.argmax(-1))])"]
    else:
        uses += ["print(model(**batch)[0].shape)"]
    return "\n".join([f"from transformers import {names}", "", _FOLDER, *loads, *uses])


def _some_inputs(trained: Trained) -> Mapping[str, Any]:
    """What a model of no texts is given, as tensors of some size."""
    task = trained.spec.task
    if task.tokenizes:
        import torch

        return {"input_ids": torch.tensor([[2, 3]])}
    return dict(task.model_inputs(1, min(50, trained.spec.row_tokens)))


def _zeros(library: str, tensor: Any) -> str:
    if not tensor.is_floating_point():
        return f"{library}.{'tensor' if library == 'torch' else 'array'}({tensor.tolist()})"
    shape = tuple(tensor.shape)
    return (
        f"torch.zeros({', '.join(map(str, shape))})"
        if library == "torch"
        else f"np.zeros({shape}, np.float32)"
    )


def _made_by(trained: Trained) -> str:
    return (
        "  # numbers of names in tokenizer.json"
        if trained.spec.task.tokenizes
        else "  # as its processor's files here make them"
    )
