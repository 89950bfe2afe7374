"""The Kubernetes manifests: rendered by kustomize, checked against the published schemas."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped] # ships no types
import pytest
import yaml

from app.draining import LAST_ACCEPT_S
from app.main import CLOSE_S
from app.settings import PREFIX, Settings

FOLDER = Path(__file__).parents[2] / "docker/kubernetes"
OVERLAYS = ("base", "gpu")
# The oldest release whose preStop can sleep without a shell, and one of today.
RELEASES = ("1.30", "1.34")
CUSTOM_RESOURCES = {"ServiceMonitor"}  # of the Prometheus operator: not in Kubernetes' schemas
# After the grace time: who has just connected, a stuck engine, the last spans.
LAST_WORDS_S = LAST_ACCEPT_S + 2 * CLOSE_S

Resource = dict[str, Any]


@pytest.fixture(params=OVERLAYS)
def resources(request: pytest.FixtureRequest) -> dict[str, Resource]:
    """Return each overlay's resources by kind."""
    return _rendered(request.param)


@pytest.fixture
def pod(resources: dict[str, Resource]) -> Resource:
    """Return the pod that the Deployment makes."""
    template: Resource = resources["Deployment"]["spec"]["template"]
    return template


@pytest.mark.parametrize("release", RELEASES)
def test_the_published_schemas_accept_every_resource(
    resources: dict[str, Resource], release: str
) -> None:
    """Kubernetes' own strict schemas of several releases accept each resource."""
    for kind, resource in resources.items():
        if kind not in CUSTOM_RESOURCES:
            kubernetes_validate.validate(resource, release, strict=True)


def test_all_that_a_fleet_needs_is_there(resources: dict[str, Resource]) -> None:
    """Deployment, Service, budget, autoscaler, network policy and monitor exist."""
    assert set(resources) == {
        "Deployment",
        "HorizontalPodAutoscaler",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Service",
        "ServiceMonitor",
    }


def test_every_selector_finds_the_pods(resources: dict[str, Resource], pod: Resource) -> None:
    """Each selector names the pods' own label: an empty one would take in strangers."""
    labels = pod["metadata"]["labels"]
    assert labels
    assert resources["Service"]["spec"]["selector"] == labels
    assert resources["Service"]["metadata"]["labels"] == labels  # the monitor's way
    for kind, name in (
        ("Deployment", "selector"),
        ("PodDisruptionBudget", "selector"),
        ("NetworkPolicy", "podSelector"),
        ("ServiceMonitor", "selector"),
    ):
        assert resources[kind]["spec"][name] == {"matchLabels": labels}, kind
    target = resources["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == resources["Deployment"]["metadata"]["name"]


def test_pods_are_restricted(pod: Resource) -> None:
    """Pods meet Kubernetes' restricted standard, with a read-only root and no API token."""
    (container,) = pod["spec"]["containers"]
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pod["spec"]["securityContext"]["runAsUser"] > 0
    assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp"]  # noqa: S108


def test_the_grace_period_covers_the_drain(pod: Resource) -> None:
    """Kubernetes waits at least for preStop, drain delay and grace time together."""
    (container,) = pod["spec"]["containers"]
    settings = _settings(container)
    needed = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed += settings.drain_delay_s + settings.grace_s + LAST_WORDS_S
    assert pod["spec"]["terminationGracePeriodSeconds"] >= needed


def test_the_service_knows_every_variable(pod: Resource) -> None:
    """Each variable is a setting, and Kubernetes adds no MIXER_SERVE_… ones of its own."""
    (container,) = pod["spec"]["containers"]
    assert _settings(container)
    assert pod["spec"]["enableServiceLinks"] is False


def test_probes_ask_the_right_question(pod: Resource) -> None:
    """Start and readiness ask /readyz; only life, which knows nothing of load, asks /livez."""
    (container,) = pod["spec"]["containers"]
    asked = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness")}
    assert {probe["path"] for probe in asked.values()} == {"/readyz"}
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    (port,) = container["ports"]
    assert port == {"name": "http", "containerPort": Settings.model_fields["port"].default}


def test_the_autoscaler_reads_a_metric_that_is_made(resources: dict[str, Resource]) -> None:
    """The autoscaler's metric is the one that the adapter makes from the service's histogram."""
    (metric,) = resources["HorizontalPodAutoscaler"]["spec"]["metrics"]
    (rule,) = yaml.safe_load((FOLDER / "custom-metrics.yaml").read_text())["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    sources = re.findall(r"mixer_\w+", rule["metricsQuery"])
    assert sources == [
        "mixer_queue_seconds_sum",
        "mixer_queue_seconds_count",
        "mixer_inference_seconds_count",
    ]


def test_only_the_gpu_overlay_takes_a_gpu() -> None:
    """The GPU overlay asks for one GPU and the image with CUDA, the base for neither."""
    found = {}
    for overlay in OVERLAYS:
        (container,) = _rendered(overlay)["Deployment"]["spec"]["template"]["spec"]["containers"]
        found[overlay] = (
            container["image"],
            container["resources"]["limits"].get("nvidia.com/gpu"),
        )
    assert found == {"base": ("mixer-serve:cpu", None), "gpu": ("mixer-serve:gpu", "1")}


def test_registry_named_in_both_overlays(tmp_path: Path) -> None:
    """Naming a registry in both files gives the GPU overlay its own image, not the CPU's."""
    folder = Path(shutil.copytree(FOLDER, tmp_path / "kubernetes"))
    base, gpu = (folder / overlay / "kustomization.yaml" for overlay in ("base", "gpu"))
    base.write_text(base.read_text().replace("newName: ", "newName: registry.example/"))
    gpu.write_text(gpu.read_text().replace("value: ", "value: registry.example/"))
    (container,) = _built(folder / "gpu")["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example/mixer-serve:gpu"


def test_replicas_on_gpus_are_bounded_apart() -> None:
    """The overlay for GPUs does not ask for the base's three to twenty replicas."""
    bounds = {
        overlay: (found["minReplicas"], found["maxReplicas"])
        for overlay in OVERLAYS
        for found in [_rendered(overlay)["HorizontalPodAutoscaler"]["spec"]]
    }
    assert bounds == {"base": (3, 20), "gpu": (1, 4)}


def test_no_overlay_shortens_the_start() -> None:
    """A replica may take as long to load and warm up on a GPU as on CPUs."""
    for overlay in OVERLAYS:
        spec = _rendered(overlay)["Deployment"]["spec"]["template"]["spec"]
        probe = spec["containers"][0]["startupProbe"]
        assert probe["failureThreshold"] * probe["periodSeconds"] == 300


@cache
def _rendered(overlay: str) -> dict[str, Resource]:
    return _built(FOLDER / overlay)


def _built(folder: Path) -> dict[str, Resource]:
    if shutil.which("kustomize"):
        command = ["kustomize", "build"]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    else:
        pytest.skip("needs kustomize or kubectl to render the manifests")
    done = subprocess.run([*command, folder], capture_output=True, text=True, check=True)
    found = {resource["kind"]: resource for resource in yaml.safe_load_all(done.stdout)}
    assert done.stdout.count("\nkind: ") == len(found), "two resources of one kind"
    return found


def _settings(container: Resource) -> Settings:
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    names = {name.removeprefix(PREFIX).lower(): value for name, value in variables.items()}
    return Settings.model_validate(names)
