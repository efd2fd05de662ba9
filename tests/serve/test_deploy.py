"""The Kubernetes manifest and the Grafana dashboard, against what the server really has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ffl_deploy.bundle import Bundle
from serve.server.limits import PROBES
from serve.server.settings import ModelSpec, Settings

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"\b(?:ffl|process)_[a-z_]+")


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def settings(manifests: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """What ffl-serve makes of the manifest's arguments behind the image's own."""
    from serve.command import parse_arguments

    token = tmp_path_factory.mktemp("secrets") / "token"
    token.write_text("0123456789abcdef0123456789abcdef")
    token.chmod(0o600)
    arguments = [argument.replace("/secrets/token", str(token)) for argument in container(manifests)["args"]]
    (entry,) = re.findall(
        r"^ENTRYPOINT (.*)$", (ROOT / "Dockerfile").read_text().partition("AS serve-cpu")[2], re.MULTILINE
    )
    return parse_arguments([*json.loads(entry)[1:], *arguments])


def container(manifests: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod(manifests)["containers"]
    return found  # type: ignore[no-any-return]


def pod(manifests: dict[str, Any]) -> dict[str, Any]:
    return manifests["Deployment"]["spec"]["template"]["spec"]  # type: ignore[no-any-return]


def test_ports_and_probes_are_the_servers(manifests: dict[str, Any], settings: Settings) -> None:
    ports = {port["name"]: port["containerPort"] for port in container(manifests)["ports"]}
    assert ports == {"http": settings.port, "grpc": settings.grpc_port}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container(manifests)[probe]["httpGet"]
        assert asked["path"] in PROBES, "a kubelet has no token"
        assert asked["port"] == "http"
    assert {port["targetPort"] for port in manifests["Service"]["spec"]["ports"]} == set(ports)


def test_a_pod_has_the_time_that_draining_takes(manifests: dict[str, Any], settings: Settings) -> None:
    assert (
        pod(manifests)["terminationGracePeriodSeconds"] > settings.drain_seconds + settings.shutdown_seconds
    )
    assert settings.drain_seconds > container(manifests)["readinessProbe"]["periodSeconds"]


def test_clients_in_the_cluster_are_answered(manifests: dict[str, Any], settings: Settings) -> None:
    assert manifests["Service"]["metadata"]["name"] in settings.allowed_hosts
    assert settings.host == "0.0.0.0"
    assert settings.token
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for kind, where in (("Service", ("spec", "selector")), ("PodDisruptionBudget", ("spec", "selector"))):
        selector = manifests[kind]
        for key in where:
            selector = selector[key]
        assert selector.get("matchLabels", selector).items() <= labels.items()


def test_it_runs_without_privileges_and_writes_where_the_image_does(manifests: dict[str, Any]) -> None:
    security = container(manifests)["securityContext"]
    assert (security["readOnlyRootFilesystem"], security["allowPrivilegeEscalation"]) == (True, False)
    assert f"--uid {pod(manifests)['securityContext']['runAsUser']}" in (ROOT / "Dockerfile").read_text()
    volumes = {volume["name"]: volume for volume in pod(manifests)["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container(manifests)["volumeMounts"]}
    assert set(mounts.values()) == set(volumes)
    for writable in ("/tmp", "/cache"):
        assert "emptyDir" in volumes[mounts[writable]]


def test_the_dashboard_asks_for_what_is_exported(
    two_bundles: tuple[Bundle, Bundle], start_server: Callable[[Settings], Any]
) -> None:
    """Every metric and every label of the dashboard is there after one request over each way."""
    models = (ModelSpec("fused", two_bundles[0].folder),)
    with start_server(Settings(models, demo=False)) as running:
        image = {"name": "images", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [0] * 3072}
        assert httpx.post(f"{running.url}/v2/models/fused/infer", json={"inputs": [image]}).status_code == 200
        text = httpx.get(f"{running.url}/metrics").text
    exported: dict[str, set[str]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, labels = line.partition(" ")[0].partition("{")
            exported.setdefault(name, {"instance"}).update(re.findall(r'([a-z_0-9]+)="', labels))
    board = json.loads((ROOT / "deploy" / "grafana.json").read_text(encoding="utf-8"))
    asked = 0
    for panel in board["panels"]:
        for target in panel["targets"]:
            names = set(NAME.findall(target["expr"]))
            assert names, panel["title"]
            assert names <= set(exported), panel["title"]
            known = set().union(*(exported[name] for name in names))
            by = ",".join(re.findall(r"by \(([^)]*)\)", target["expr"]))
            grouped = {label.strip() for label in by.split(",")} - {""}
            selected = set(re.findall(r"[{,]\s*([a-z_]+)[=!]", target["expr"]))
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert grouped | selected | shown <= known, panel["title"]
            asked += 1
    assert asked >= 12
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
