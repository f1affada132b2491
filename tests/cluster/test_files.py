"""The files of `cluster/`: by Ray's own rules for its launcher, by KubeRay's definitions, and by
shellcheck."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
DEFINITIONS = ROOT.parent / "shared" / "kuberay"
LAUNCHERS = sorted(path.name for path in CLUSTER.glob("*.yaml"))
MANIFESTS = sorted(path.name for path in (CLUSTER / "kuberay").glob("*.yaml"))


def load_launcher(name: str) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(yaml.safe_load((CLUSTER / name).read_text()))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_takes_each_launcher_file(name: str):
    config = load_launcher(name)
    assert config["cluster_name"] == "dray"
    commands = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in commands  # nobody else reaches it
    assert "RAY_AUTH_MODE=token" in commands + " ".join(config["docker"].get("run_options", []))
    assert any("-m 600" in command for command in config["setup_commands"])


@pytest.mark.parametrize("name", [name for name in LAUNCHERS if name != "local.yaml"])
def test_a_clouds_head_holds_no_rank_and_its_workers_come_only_when_needed(name: str):
    types = load_launcher(name)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    markets = {kind.get("labels", {}).get("market") for kind in types.values()}
    assert {"spot", "on-demand"} <= markets
    assert all(kind.get("min_workers", 0) == 0 for kind in types.values())


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_takes_each_manifest(name: str):
    if not DEFINITIONS.is_dir():
        pytest.skip("KubeRay's definitions are not here")
    own = 0
    for manifest in yaml.safe_load_all((CLUSTER / "kuberay" / name).read_text()):
        if manifest["apiVersion"] != "ray.io/v1":
            continue
        own += 1
        file = DEFINITIONS / f"ray.io_{manifest['kind'].lower()}s.yaml.gz"
        definition = yaml.safe_load(gzip.decompress(file.read_bytes()))
        schemas = {
            v["name"]: v["schema"]["openAPIV3Schema"] for v in definition["spec"]["versions"]
        }
        schema = closed(schemas["v1"])
        jsonschema.Draft7Validator(schema).validate(manifest)
        wrong = {**manifest, "spec": {**manifest["spec"], "rayVersionn": "2"}}
        assert list(jsonschema.Draft7Validator(schema).iter_errors(wrong))
    assert own == 1


def closed(schema: Any) -> Any:
    """A schema that takes no unknown keys, as the API server does, and knows what Kubernetes means
    by a number or a text."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items() if not key.startswith("x-")}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    free = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and "properties" in schema and not free:
        found["properties"].setdefault("apiVersion", {})
        found["properties"].setdefault("kind", {})
        found["additionalProperties"] = False
    if set(schema.get("properties", {})) == {"apiVersion", "kind", "metadata", "spec", "status"}:
        found["properties"]["metadata"] = {"type": "object"}
    return found


def test_the_shell_is_sound():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not here")
    found = subprocess.run(
        [shellcheck, str(CLUSTER / "slurm.sh")], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout
