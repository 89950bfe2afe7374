"""The InferenceService: KServe's schema is not published, that of the pod it makes is."""

from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped] # ships no types
import pytest
import yaml
from starlette.testclient import TestClient

from tests.docker.test_kubernetes import LAST_WORDS_S, RELEASES

FILE = Path(__file__).parents[2] / "docker/kubernetes/inferenceservice.yaml"
SCALING = ("minReplicas", "maxReplicas")  # KServe's own beside the pod's members


@pytest.fixture
def pod() -> dict[str, Any]:
    """Return the pod that KServe makes of the predictor."""
    predictor = yaml.safe_load(FILE.read_text())["spec"]["predictor"]
    spec = {name: value for name, value in predictor.items() if name not in SCALING}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": spec}


@pytest.mark.parametrize("release", RELEASES)
def test_the_published_schemas_accept_the_pod(pod: dict[str, Any], release: str) -> None:
    """Kubernetes' own strict schemas of several releases accept the predictor's pod."""
    kubernetes_validate.validate(pod, release, strict=True)


def test_probes_are_of_the_protocol(pod: dict[str, Any], client: TestClient) -> None:
    """The probes ask what the Open Inference Protocol defines, and the service answers them."""
    [container] = pod["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        path = container[probe]["httpGet"]["path"]
        assert path.startswith("/v2/health/")
        assert client.get(path).status_code == 200


def test_grace_covers_the_drain(pod: dict[str, Any]) -> None:
    """Kubernetes waits longer than the service drains."""
    [container] = pod["spec"]["containers"]
    times = {one["name"]: float(one["value"]) for one in container["env"]}
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    needed = sleep + times["MIXER_DRAIN_DELAY_S"] + times["MIXER_GRACE_S"] + LAST_WORDS_S
    assert pod["spec"]["terminationGracePeriodSeconds"] >= needed
