"""What has to be known of an architecture to size it, without transformers: the one source for
planning and building.

Names are transformers' model types. A test compares with its configurations and models.
"""

from __future__ import annotations

# Their feed-forward block is two matrices, and by default four times as wide as the model; all
# others' has a gate.
_UNGATED = frozenset(
    (
        "albert",
        "apertus",
        "arcee",
        "bart",
        "bert",
        "bert-generation",
        "big_bird",
        "bigbird_pegasus",
        "biogpt",
        "bitnet",
        "blenderbot",
        "blenderbot-small",
        "bloom",
        "camembert",
        "beit",
        "canine",
        "codegen",
        "convbert",
        "data2vec-audio",
        "data2vec-text",
        "data2vec-vision",
        "deberta",
        "deberta-v2",
        "deit",
        "dinov2",
        "distilbert",
        "electra",
        "ernie",
        "esm",
        "falcon",
        "falcon_mamba",
        "fnet",
        "funnel",
        "git",
        "gpt-sw3",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "gte",
        "hubert",
        "ibert",
        "ijepa",
        "jais2",
        "jetmoe",
        "jina_embeddings_v3",
        "layoutlm",
        "layoutlmv2",
        "layoutlmv3",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "lilt",
        "longformer",
        "luke",
        "mamba",
        "mamba2",
        "marian",
        "markuplm",
        "mbart",
        "megatron-bert",
        "mobilebert",
        "mpnet",
        "mpt",
        "mra",
        "mt5",
        "mvp",
        "nanochat",
        "nemotron",
        "nemotron_h",
        "nystromformer",
        "openai-gpt",
        "opt",
        "pegasus",
        "persimmon",
        "phi",
        "plbart",
        "prophetnet",
        "recurrent_gemma",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "rwkv",
        "sew",
        "sew-d",
        "squeezebert",
        "starcoder2",
        "t5",
        "tapas",
        "trocr",
        "umt5",
        "unispeech",
        "unispeech-sat",
        "vit",
        "vit_msn",
        "wav2vec2",
        "wav2vec2-bert",
        "wav2vec2-conformer",
        "wavlm",
        "whisper",
        "xglm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xlnet",
        "xmod",
        "yoso",
        "zamba",
        "zamba2",
    )
)

# Their positions are counted from the padding id on, so the table needs as many rows more.
OFFSET_POSITIONS = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "roberta-prelayernorm",
    "data2vec-text",
    "xmod",
    "mpnet",
    "longformer",
    "esm",
    "ibert",
    "layoutlmv3",
    "lilt",
    "luke",
    "markuplm",
)

# `make models` saw their losses differ from those under ZeRO 0, or gradients without bounds. Or
# a weight of theirs is computed of a direction and a norm, which are taken apart when ZeRO 3 has
# parted it already.
WRONG_UNDER_ZERO_3 = (
    "openai-gpt",
    "data2vec-audio",
    "hubert",
    "sew",
    "sew-d",
    "unispeech",
    "unispeech-sat",
    "wav2vec2",
    "wav2vec2-conformer",
    "wavlm",
)

_HARMLESS_OPTIONS = (
    "activation_function",
    "classifier_activation",
    "decoder_activation",
    "embedding_dropout",
    "hidden_act",
    "hidden_activation",
    "initializer_cutoff_factor",
    "initializer_range",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_eps",
    "rms_norm_eps",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_pdrop",
    "classifier_dropout",
    "embd_pdrop",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_pdrop",
)
# Options that the formulas of `parameters.py` heed, or that change neither sizes nor work; with any
# other one a model is counted itself. A test tries each.
HEEDED_OPTIONS = {
    architecture: (*_HARMLESS_OPTIONS, *names)
    for architecture, names in {
        "llama": ("head_dim", "attention_bias", "mlp_bias"),
        "mistral": ("head_dim", "sliding_window"),
        "qwen2": (),
        "gpt2": (),
        "gpt_neox": ("attention_bias",),
        "gpt_bigcode": ("multi_query",),
        "starcoder2": ("use_bias", "sliding_window"),
        "nemotron": ("head_dim",),
        "bert": ("type_vocab_size",),
        "roberta": ("type_vocab_size",),
        "distilbert": (),
        "modernbert": ("local_attention",),
        "vit": ("patch_size", "image_size", "num_channels"),
    }.items()
}


def is_gated(architecture: str) -> bool:
    """Whether the feed-forward block has a gate: all but the older families."""
    return architecture not in _UNGATED


def default_intermediate_size(architecture: str, hidden_size: int) -> int:
    """Width of the feed-forward block: 8/3 of the hidden size where it is gated, else 4 times: as
    many weights."""
    return hidden_size * 8 // 3 if is_gated(architecture) else hidden_size * 4


def position_rows(architecture: str, positions: int, pad_token_id: int | None) -> int:
    """Rows of the table of positions."""
    return positions + ((pad_token_id or 0) + 1 if architecture in OFFSET_POSITIONS else 0)
