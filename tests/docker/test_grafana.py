"""The Grafana dashboard and what it draws."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from starlette.testclient import TestClient

from tests.conftest import Serve
from tests.fakes import make_image

FOLDER = Path(__file__).parents[2] / "docker"


@pytest.fixture
def panels() -> list[dict[str, Any]]:
    """Return the dashboard's panels that draw something."""
    board = json.loads((FOLDER / "grafana/mixer-serve.json").read_text())
    return [panel for panel in board["panels"] if panel["type"] != "row"]


@pytest.fixture
def busy(serve: Serve) -> TestClient:
    """Return a service that has answered, erred and refused."""
    client = serve(queue_size=2)
    client.post("/classify", content=make_image())
    client.post("/classify/batch", files=[("files", make_image())] * 3)
    return client


def test_every_metric_exists(panels: list[dict[str, Any]], busy: TestClient) -> None:
    """Each metric that a panel draws is shown by the service, and each of ours is drawn."""
    text = busy.get("/metrics").text
    shown = set(re.findall(r"^([a-z_]+)(?:\{|\s)", text, re.MULTILINE))
    drawn = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"((?:mixer|process)_[a-z_]+)\{", target["expr"])
    }
    assert drawn - shown == set()
    families = set(re.findall(r"^# TYPE (mixer_[a-z_]+) ", text, re.MULTILINE))
    forgotten = {
        family for family in families if not any(name.startswith(family) for name in drawn)
    }
    assert forgotten == set()


def test_every_label_exists(panels: list[dict[str, Any]], busy: TestClient) -> None:
    """Each label that a panel groups by is one of our metrics'."""
    text = busy.get("/metrics").text
    for panel in panels:
        for target in panel["targets"]:
            for labels in re.findall(r"by \(([a-z, ]+)\)", target["expr"]):
                for label in labels.split(", "):
                    assert f'{label}="' in text, (panel["title"], label)


def test_every_panel_says_what_it_means(panels: list[dict[str, Any]]) -> None:
    """Each panel has a title of its own and a description."""
    assert len({panel["title"] for panel in panels}) == len(panels)
    assert all(panel["description"] for panel in panels)


def test_grafana_finds_the_dashboard() -> None:
    """Compose mounts the dashboard where the provider looks for it."""
    grafana = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["grafana"]
    provider = yaml.safe_load((FOLDER / "grafana/provider.yaml").read_text())["providers"][0]
    mounts = dict(mount.split(":")[:2] for mount in grafana["volumes"])
    assert mounts["./grafana"] == provider["options"]["path"]
    assert all((FOLDER / source).exists() for source in mounts)
