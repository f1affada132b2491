"""A small run of every task, for tests that go through all of them: its records and its spec."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from dray.spec import Spec, make_spec
from resuming import PLACES
from tiny import tiny_tree

WORDS = ("red", "green", "old", "new", "cold", "warm")
TOKENS = 32

Record = dict[str, Any]


def sentence(drawn: random.Random, least: int = 3, most: int = 9) -> str:
    return " ".join(drawn.choice(WORDS) for _ in range(drawn.randint(least, most)))


def texts(drawn: random.Random, **others: Callable[[random.Random, str], Any]) -> Record:
    text = sentence(drawn)
    return {"text": text, **{name: make(drawn, text) for name, make in others.items()}}


def tagged(drawn: random.Random) -> Record:
    words = sentence(drawn).split()
    return {"tokens": words, "tags": ["B-AGE" if word in ("old", "new") else "O" for word in words]}


def compared(drawn: random.Random) -> Record:
    return {"prompt": sentence(drawn), "chosen": f" {sentence(drawn)}", "rejected": " go away"}


def judged(drawn: random.Random) -> Record:
    return {"prompt": sentence(drawn), "completion": " yes", "label": drawn.random() < 0.5}


def asked(drawn: random.Random) -> Record:
    return {"prompt": sentence(drawn, 2, 3), "answer": " " + drawn.choice(WORDS)}


def talk(drawn: random.Random) -> Record:
    return {"instruction": sentence(drawn), "output": sentence(drawn, 1, 3)}


def picture(drawn: random.Random) -> Record:
    bright = drawn.randrange(2)
    pixels = np.random.default_rng(drawn.randrange(2**32)).integers(0, 128, (12, 12))
    out = io.BytesIO()
    Image.fromarray((pixels + 127 * bright).astype(np.uint8)).save(out, "PNG")
    return {"image": base64.b64encode(out.getvalue()).decode(), "label": ["dark", "bright"][bright]}


def tones(drawn: random.Random) -> Record:
    """A tone a letter."""
    text = "".join(drawn.choice("ab") for _ in range(drawn.randint(2, 4)))
    times = np.arange(1600) / 16_000
    pieces = [np.sin(2 * np.pi * (400 if letter == "a" else 1200) * times) for letter in text]
    out = io.BytesIO()
    soundfile.write(out, 0.4 * np.concatenate(pieces), 16_000, format="FLAC")
    return {"audio": base64.b64encode(out.getvalue()).decode(), "text": text}


def items(drawn: random.Random) -> Record:
    start = drawn.randrange(20)
    return {"items": [f"film {(start + place) % 20}" for place in range(drawn.randint(4, 12))]}


def waves(drawn: random.Random) -> Record:
    """A signal of one of two frequencies, and a number beside it."""
    quick = drawn.randrange(2)
    phase, noise = drawn.random() * 6, np.random.default_rng(drawn.randrange(2**32)).normal(0, 0.3)
    signal = np.sin(np.arange(32) * (1.5 if quick else 0.4) + phase) + noise
    return {"signal": signal.round(4).tolist(), "age": drawn.random(), "label": "sq"[quick] + "!"}


def rated(drawn: random.Random) -> Record:
    user, item = drawn.randrange(12), drawn.randrange(20)
    return {"user": f"u{user}", "item": f"i{item}", "stars": 1 + (user + item) % 5}


def bert(**options: Any) -> dict[str, Any]:
    return {"architecture": "bert", "hidden_size": 32, "num_layers": 2, "num_heads": 2, **options}


@dataclass
class Case:
    """Records of a task, and what its spec has besides."""

    record: Callable[[random.Random], Record]
    task: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    places: Sequence[tuple[int, int]] = PLACES


def pictures(model: dict[str, Any], **options: Any) -> Case:
    return Case(
        picture,
        {"size": 12, "channels": 1, "mixup": 0.4, "cutmix": 1.0, "rotate": 10, "crop": 0.8},
        {"columns": {"image": "image"}, "label": "label"},
        {
            "model": {**model, "options": options},
            "batch": {"global_rows": 16, "micro_rows": "auto"},
            # Of gradients near zero Adam sees little but their rounding, which steps then double.
            "optimizer": {"learning_rate": 1e-3, "epsilon": 1e-4},
        },
        without=("tokenizer",),
    )


CASES = {
    "causal_lm": Case(texts),
    "embedding": Case(
        lambda drawn: texts(drawn, other=lambda _, text: text.upper()),
        {"temperature": 0.1},
        {"columns": {"text_pair": "other"}},
        {"model": bert()},
    ),
    "feature_classification": Case(
        waves,
        {
            "columns": ["signal", "age"],
            "size": 33,
            "transforms": [
                {"name": "standardize"},
                {"name": "wavelet", "keep": 24},
                {"name": "pca", "keep": 12, "whiten": True},
            ],
            "patch": 2,
        },
        {"label": "label"},
        {"model": bert(architecture="vit")},
        without=("tokenizer",),
    ),
    "image_classification": pictures(
        {"architecture": "resnet"},
        layer_type="basic",
        embedding_size=8,
        hidden_sizes=[8],
        depths=[1],
    ),
    "image_classification vit": pictures(bert(architecture="vit"), patch_size=4),
    "image_classification convnext": pictures(
        {"architecture": "convnext", "num_layers": 2},
        hidden_sizes=[8, 16],
        depths=[1, 1],
        patch_size=2,
    ),
    "instruction": Case(talk, {"template": "chatml"}),
    "masked_lm": Case(texts, sections={"model": bert()}),
    "next_item": Case(
        items,
        {},
        {"columns": {"items": "items"}},
        {"tokenizer": {"train": "words", "vocab_size": 300}},
    ),
    "policy": Case(asked, {"answers": 4, "max_tokens": 4, "rewards": {"exact": 1.0}}),
    "preference": Case(compared, {"loss": "dpo"}),
    "preference kto": Case(judged, {"loss": "kto"}),
    "rating": Case(
        rated,
        {"vector_size": 8, "unknown_share": 0.1},
        {"columns": {"user": "user", "item": "item"}, "label": "stars"},
        {
            "tokenizer": {"train": "words", "vocab_size": 300},
            "model": bert(),
            "data": {"sequence_tokens": 2},
        },
    ),
    "regression": Case(
        lambda drawn: texts(drawn, label=lambda _, text: text.count("e")),
        {"loss": "huber"},
        {"label": "label"},
        {"model": bert()},
    ),
    "reward": Case(compared),
    "seq2seq": Case(
        lambda drawn: texts(drawn, other=lambda _, text: text[::-1]),
        {},
        {"columns": {"answer": "other"}},
        {"model": bert(architecture="t5")},
    ),
    "seq2seq of a decoder": Case(
        lambda drawn: texts(drawn, other=lambda _, text: text[::-1]),
        {"decoder_only": True},
        {"columns": {"answer": "other"}},
        # At a greater rate its gradients grow again, and rounding with them: 1.1e-5 at step 24.
        {"optimizer": {"learning_rate": 1e-3}},
    ),
    "sequence_classification": Case(
        lambda drawn: texts(drawn, label=lambda drawn, _: "rare" if drawn.random() < 0.2 else "so"),
        {"class_weights": "balanced", "focal": 1.0},
        {"label": "label"},
        {"model": bert(), "data": {"balance": 0.5}},
    ),
    "sparse_autoencoder": Case(
        texts,
        {"block": 0, "features": 96, "top_k": 4, "auxiliary_top_k": 8},
        {},
        {"model": bert(), "regularization": {}},
    ),
    "sparse_autoencoder by l1": Case(
        texts,
        {"block": 1, "features": 48, "l1": 1e-3},
        {},
        {"model": bert(architecture="llama"), "regularization": {}},
    ),
    "speech_recognition": Case(
        tones,
        {"characters": "ab", "time_masks": 1},
        {"columns": {"audio": "audio"}},
        {
            "model": {
                "architecture": "wav2vec2-bert",
                "hidden_size": 16,
                "num_layers": 1,
                "num_heads": 2,
                "options": {"position_embeddings_type": "rotary", "conv_depthwise_kernel_size": 7},
            },
            "data": {"sequence_tokens": 60},
        },
        without=("tokenizer",),
    ),
    "speech_recognition of samples": Case(
        tones,
        {"characters": "ab", "features": "samples", "time_masks": 1},
        {"columns": {"audio": "audio"}},
        {
            "model": {
                "architecture": "wav2vec2",
                "hidden_size": 16,
                "num_layers": 1,
                "num_heads": 2,
                "options": {
                    "feat_extract_norm": "layer",
                    "do_stable_layer_norm": True,
                    "conv_dim": [16] * 7,
                    "num_conv_pos_embeddings": 16,
                    "num_conv_pos_embedding_groups": 4,
                },
            },
            "data": {"sequence_tokens": 60},
        },
        without=("tokenizer",),
        places=((2, 1), (1, 0), (2, 2)),  # it is refused under stage 3
    ),
    "token_classification": Case(tagged, {}, {}, {"model": bert()}),
}


def make(name: str, folder: Path, **sections: Any) -> Spec:
    case = CASES[name]
    tree = tiny_tree(
        folder,
        name=name.replace(" ", "_"),
        task={"name": name.split(maxsplit=1)[0], **case.task},
        data={
            "train": {"path": f"{folder}/*.jsonl", **case.source},
            "validation": {"share": 0.2},
            "sequence_tokens": TOKENS,
            "cleaning": {"deduplicate": "none"},
            **case.sections.get("data", {}),
        },
    )
    tree["tokenizer"] = {"train": "byte_bpe", "vocab_size": 300}
    tree["regularization"] = {"dropout": 0.1}
    tree |= {key: value for key, value in case.sections.items() if key != "data"}
    tree |= sections
    return make_spec({key: value for key, value in tree.items() if key not in case.without})
