"""The files of `cluster/`: by Ray's own rules for its launcher, by KubeRay's definitions, and by
shellcheck."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from launchers import CLUSTER, load_launcher

ROOT = CLUSTER.parent
DEFINITIONS = ROOT.parent / "shared" / "kuberay"
LAUNCHERS = sorted(path.name for path in CLUSTER.glob("*.yaml"))
MANIFESTS = sorted(path.name for path in (CLUSTER / "kuberay").glob("*.yaml"))


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


@pytest.mark.slow
def test_the_images_steps_make_an_environment_with_all_of_dray(tmp_path: Path):
    """The copies and installations of the Dockerfile, those as root aside, in an empty folder in
    the place of the image. Minutes, most of them downloads."""
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    home, is_root = str(tmp_path), True
    environment = {"HOME": home, "PATH": f"{home}/venv/bin:{os.environ['PATH']}"}
    environment |= {name: os.environ[name] for name in os.environ if name.startswith("PIP_")}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        rest = rest.replace("/home/ray", home)
        match word:
            case "USER":
                is_root = rest == "root"
            case "COPY":
                *sources, target = [item for item in rest.split() if not item.startswith("--")]
                for source in sources:  # as Docker does: links stay links
                    place = Path(target, source) if target.endswith("/") else Path(target)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy2
                    copy(
                        ROOT / source,
                        place,
                        **({"symlinks": True} if copy is not shutil.copy2 else {}),
                    )
            case "RUN" if not is_root:
                done = subprocess.run(
                    ["sh", "-c", rest],
                    cwd=home,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, done.stderr[-3000:]
    for words in (
        ["plan", "quickstart"],
        ["init", "x", "--recipe", "quickstart"],
        ["tune", "--help"],
    ):
        done = subprocess.run(
            [f"{home}/venv/bin/dray", *words],
            cwd=home,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    code = (
        "from dray.sweep.space import SPACES; print(*SPACES.names()); import aiohttp, mlflow\n"
        "import ray.autoscaler._private._azure.node_provider\n"
        "import ray.autoscaler._private.aws.node_provider\n"
        "import ray.autoscaler._private.gcp.node_provider"
    )
    done = subprocess.run(
        [f"{home}/venv/bin/python", "-c", code],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == sorted(
        path.stem for path in (ROOT / "tune_spaces").glob("*.yaml")
    ), done.stderr
