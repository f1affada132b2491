"""The launcher files of the clouds, by Ray's own bootstrap code and node providers, which speak
with a stand-in in the place of the cloud: moto's EC2 of AWS; of Google Cloud and Azure a record of
what is asked for, held to what Google and Azure publish of their interfaces."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from launchers import load_launcher


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The keys of ssh that Ray makes are written here."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    return tmp_path


def node_tags(name: str) -> dict[str, str]:
    return {"ray-node-name": name, "ray-node-type": "worker", "ray-user-node-type": name}


def test_rays_own_code_starts_a_node_of_each_kind_on_aws(monkeypatch: pytest.MonkeyPatch):
    """Keys, subnet, security group and image are found or made by Ray's bootstrap code, and its
    provider starts an instance of each type."""
    moto = pytest.importorskip("moto", reason="moto is not installed")
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(variable, "test")
    with moto.mock_aws():
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        config = bootstrap_aws(load_launcher("aws.yaml"))
        provider = AWSNodeProvider(config["provider"], "dray")
        for name, kind in config["available_node_types"].items():
            node_config = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
            del node_config["IamInstanceProfile"]  # of an account that is there
            (made,) = provider.create_node(node_config, node_tags(name), 1).values()
            assert made.instance_type == kind["node_config"]["InstanceType"]
            is_spot = "InstanceMarketOptions" in kind["node_config"]
            assert (made.instance_lifecycle == "spot") == is_spot
            assert made.placement["AvailabilityZone"] == config["provider"]["availability_zone"]


class Google:
    """Answers what Ray asks Google Cloud for, in the place of `httplib2.Http.request`."""

    def __init__(self) -> None:
        self.instances: list[dict[str, Any]] = []

    def answer(self, method: str, uri: str, body: dict[str, Any]) -> dict[str, Any]:
        path, done = uri.partition("?")[0], {"name": "operation", "status": "DONE"}
        match path.rpartition("/")[2].rpartition(":")[2]:
            case "getIamPolicy" | "setIamPolicy":
                return {"bindings": []}
            case "subnetworks":
                return {"items": [{"selfLink": "https://compute/subnetworks/default"}]}
            case "setCommonInstanceMetadata":
                return done
            case "instances" if method == "POST":
                self.instances.append(body)
                return done
        if "serviceAccounts" in path:
            return {"email": "ray@project.iam.gserviceaccount.com", "projectId": "project"}
        if "operations" in path:
            return done
        if path.startswith("https://compute"):
            return {"name": "project", "commonInstanceMetadata": {}}
        return {"projectId": "project", "lifecycleState": "ACTIVE"}

    def request(
        self, uri: str, method: str = "GET", body: Any = None, **_: Any
    ) -> tuple[Any, bytes]:
        import httplib2

        found = self.answer(method, uri, json.loads(body) if body else {})
        return httplib2.Response({"status": "200"}), json.dumps(found).encode()


@functools.cache
def google_schema() -> dict[str, Any]:
    """Google's own description of an instance, as JSON Schema that takes no unknown keys."""
    from googleapiclient.discovery_cache import get_static_doc

    def as_schema(item: Any) -> Any:
        if isinstance(item, list):
            return [as_schema(one) for one in item]
        if not isinstance(item, dict):
            return item
        if isinstance(item.get("$ref"), str):
            return {"$ref": f"#/$defs/{item['$ref']}"}
        wanted = ("type", "properties", "items", "additionalProperties", "enum")
        found = {
            key: {name: as_schema(one) for name, one in item[key].items()}
            if key == "properties"
            else as_schema(item[key])
            for key in wanted
            if key in item
        }
        if item.get("format") in ("int64", "uint64"):  # JSON's numbers cannot hold all of these
            found["type"] = ["string", "integer"]
        if "properties" in found:
            found.setdefault("additionalProperties", False)
        return found

    schemas = json.loads(get_static_doc("compute", "v1"))["schemas"]
    definitions = {name: as_schema(item) for name, item in schemas.items()}
    return {"$ref": "#/$defs/Instance", "$defs": definitions}


def test_rays_own_code_asks_google_for_a_node_of_each_kind(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("googleapiclient", reason="google-api-python-client is not installed")
    from ray.autoscaler._private.gcp.config import bootstrap_gcp
    from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider

    google = Google()
    monkeypatch.setattr(
        "httplib2.Http.request", lambda _, *given, **by: google.request(*given, **by)
    )
    launcher = load_launcher("gcp.yaml")
    launcher["provider"]["gcp_credentials"] = {"type": "credentials_token", "credentials": "t"}
    config = bootstrap_gcp(launcher)
    provider = GCPNodeProvider(config["provider"], "dray")
    for name, kind in config["available_node_types"].items():
        provider.create_node(kind["node_config"], node_tags(name), 1)
        instance = google.instances[-1]
        jsonschema.Draft202012Validator(google_schema()).validate(instance)
        assert instance["labels"]["ray-user-node-type"] == name
        is_spot = instance.get("scheduling", {}).get("provisioningModel") == "SPOT"
        assert is_spot == (name == "gpu_spot")
    assert len(google.instances) == len(config["available_node_types"])
    wrong = {**google.instances[0], "machineTyp": "n2-standard-8"}
    assert not jsonschema.Draft202012Validator(google_schema()).is_valid(wrong)


class Azure:
    """Answers what Ray asks Azure's resource manager for; keeps the deployments."""

    def __init__(self) -> None:
        self.deployments: list[dict[str, Any]] = []

    def answer(self, request: Any) -> tuple[int, dict[str, str], str]:
        path = request.url.partition("?")[0]
        found: dict[str, Any] = {"id": path, "name": path.rpartition("/")[2], "properties": {}}
        if "/deployments/" in path and request.method == "PUT":
            self.deployments.append(json.loads(request.body)["properties"])
            outputs = {name: {"value": f"/{name}"} for name in ("msi", "nsg", "subnet")}
            found["properties"] = {"provisioningState": "Succeeded", "outputs": outputs}
        elif path.endswith(("/resources", "/skus")):
            found = {"value": []}
        elif request.method == "GET":
            return 404, {}, json.dumps({"error": {"code": "NotFound", "message": "not there"}})
        return 200, {"Content-Type": "application/json"}, json.dumps(found)


def check_deployment(asked: dict[str, Any]) -> None:
    """Parameters are those of the template, each of its type, as Azure demands it."""
    declared = asked["template"]["parameters"]
    types = {"string": str, "securestring": str, "int": int, "bool": bool, "object": dict}
    types["array"] = list
    given = {name: item["value"] for name, item in asked["parameters"].items()}
    assert not given.keys() - declared.keys()
    assert {name for name in declared if "defaultValue" not in declared[name]} <= given.keys()
    for name, value in given.items():
        assert isinstance(value, types[declared[name]["type"].lower()]), name
        assert value in declared[name].get("allowedValues", [value]), name


def test_rays_own_code_asks_azure_for_a_node_of_each_kind(
    home: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("azure.mgmt.resource", reason="the clouds' libraries are not installed")
    import responses
    from azure.core.credentials import AccessToken
    from ray.autoscaler._private._azure import config as ray_config
    from ray.autoscaler._private._azure import node_provider as ray_provider

    class Anybody:
        def __init__(self, **_: Any) -> None: ...

        def get_token(self, *_: Any, **__: Any) -> AccessToken:
            return AccessToken("token", 2**40)

    monkeypatch.setattr(ray_config, "AzureCliCredential", Anybody)
    monkeypatch.setattr(ray_provider, "DefaultAzureCredential", Anybody)
    for name in ("id_rsa", "id_rsa.pub"):  # as the file's header asks for
        (home / ".ssh" / name).write_text("ssh-rsa AAAA somebody")
    azure = Azure()
    with responses.RequestsMock(assert_all_requests_are_fired=False) as cloud:
        for method in ("GET", "PUT", "POST", "DELETE", "PATCH"):
            cloud.add_callback(
                method, re.compile(r"https://management\.azure\.com/.*"), callback=azure.answer
            )
        launcher = load_launcher("azure.yaml")
        launcher["provider"]["subscription_id"] = "00000000-0000-0000-0000-000000000000"
        config = ray_config.bootstrap_azure(launcher)
        provider = ray_provider.AzureNodeProvider(config["provider"], "dray")
        made = len(azure.deployments)
        for name, kind in config["available_node_types"].items():
            provider.create_node(kind["node_config"], node_tags(name), 1)
            asked = azure.deployments[-1]
            check_deployment(asked)
            size = kind["node_config"]["azure_arm_parameters"]["vmSize"]
            assert asked["parameters"]["vmSize"]["value"] == size
            priority = asked["parameters"].get("priority", {}).get("value")
            assert (priority == "Spot") == (name == "gpu_spot")
    assert len(azure.deployments) - made == len(config["available_node_types"])
    with pytest.raises(AssertionError):
        check_deployment({**asked, "parameters": {**asked["parameters"], "vmSiz": {"value": 1}}})
