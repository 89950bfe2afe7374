"""The Dockerfile and its lock files, as far as they can be checked without a build."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = sorted((ROOT / "docker").glob("*.lock"))
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_hadolint_finds_nothing() -> None:
    """The Dockerfile passes hadolint."""
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_label_names_this_version() -> None:
    """The image's version is the project's."""
    assert f"ARG VERSION={PROJECT['version']}\n" in DOCKERFILE


def test_the_base_is_pinned_by_version() -> None:
    """The base image is a build argument whose default names a release."""
    assert re.search(r"^ARG BASE=\S+:\d+\.\d+\S*$", DOCKERFILE, re.MULTILINE)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_package_is_locked_by_hash(lock: Path) -> None:
    """Each package of a lock has one version and its hashes, and no host is named."""
    text = lock.read_text()
    packages = re.findall(r"^[a-z0-9].*(?:\n    .*)*", text, re.MULTILINE)
    assert packages
    assert all("==" in entry and "--hash=sha256:" in entry for entry in packages)
    assert "://" not in text
    assert "index-url" not in text


def test_an_image_has_one_onnxruntime_and_no_torch() -> None:
    """The CPU lock has onnxruntime, the GPU lock onnxruntime-gpu, and neither has torch."""
    assert _names("cpu") & {"onnxruntime", "onnxruntime-gpu", "torch"} == {"onnxruntime"}
    assert _names("gpu") & {"onnxruntime", "onnxruntime-gpu", "torch"} == {"onnxruntime-gpu"}


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
def test_locks_hold_what_the_project_asks_for(extra: str) -> None:
    """Each dependency of the project is in the lock as it may be; after a change, run make lock."""
    wanted = map(Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"][extra])
    locked = _releases(extra)
    for requirement in wanted:
        assert requirement.specifier.contains(locked[requirement.name]), requirement


def _names(lock: str) -> set[str]:
    return set(_releases(lock))


def _releases(lock: str) -> dict[str, str]:
    """Return the locked release of each package, the newest where there are several."""
    text = (ROOT / f"docker/{lock}.lock").read_text()
    found = re.findall(r"^([a-z0-9-]+)==([^ ;]+)", text, re.MULTILINE)
    return dict(sorted(found, key=lambda pair: Version(pair[1])))
