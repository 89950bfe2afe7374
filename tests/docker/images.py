"""Images built for real, without a Docker daemon: buildah over a debootstrapped Debian."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BASE = "localhost/base"
CONTEXT = (".dockerignore", "Dockerfile", "LICENSE", "README.md", "app", "docker", "pyproject.toml")
NEEDED = ("buildah", "debootstrap", "setpriv", "unshare")


@dataclass(frozen=True)
class Image:
    """An image whose files are mounted at `files`; `config` is what its Dockerfile set."""

    files: Path
    config: Mapping[str, Any]

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that ENV set."""
        return dict(variable.split("=", 1) for variable in self.config["Env"])

    @property
    def packages(self) -> Path:
        """Return its site-packages."""
        return next(self.files.glob("opt/mixer/lib/python3.*/site-packages"))


class Store:
    """Images in a folder of their own, so that nothing of the machine's is touched."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def bootstrap(self, suite: str) -> None:
        """Make the base image: what debootstrap calls the smallest Debian."""
        files = self._folder / "debian"
        _run("debootstrap", "--variant=minbase", suite, str(files))
        shutil.rmtree(files / "var/cache/apt")
        for index in (files / "var/lib/apt/lists").glob("*_*"):  # 57 MB that no Debian image has
            index.unlink()
        container = self._buildah("from", "scratch")
        _run("cp", "--archive", f"{files}/.", self._buildah("mount", container))
        self._buildah("commit", "--quiet", "--format=docker", container, BASE)
        self._buildah("rm", container)

    def build(self, target: str) -> None:
        """Build a target of the Dockerfile, with this machine's way to the package index."""
        certificates, pip = self._folder / "ca.crt", self._folder / "pip.conf"
        shutil.copy(
            os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"), certificates
        )
        # At the build only, and at a path that no package of Debian owns.
        pip.write_text("[global]\ncert = /etc/build-ca.crt\n" + _index_settings())
        self._buildah(
            "build",
            "--quiet",
            "--layers",  # the targets share their first stages
            "--format=docker",  # OCI's knows no HEALTHCHECK
            f"--build-arg=BASE={BASE}",
            f"--volume={certificates}:/etc/build-ca.crt:ro",
            f"--volume={pip}:/etc/pip.conf:ro",
            f"--target={target}",
            f"--tag={target}",
            str(self._checkout()),
        )

    def _checkout(self) -> Path:
        """Return a copy of what the Dockerfile may read, as umask 077 makes one: its owner's."""
        copy = self._folder / "checkout"
        if not copy.exists():
            copy.mkdir()
            for name in CONTEXT:
                _run("cp", "--recursive", str(ROOT / name), str(copy))
            _run("chmod", "--recursive", "go=", str(copy))
        return copy

    @contextmanager
    def opened(self, name: str) -> Iterator[Image]:
        """Mount an image."""
        described = json.loads(self._buildah("inspect", "--type=image", name))
        container = self._buildah("from", name)
        try:
            files = Path(self._buildah("mount", container))
            yield Image(files, described["Docker"]["config"])
        finally:
            self._buildah("rm", container)

    def remove(self) -> None:
        """Delete every image; the folder's owner deletes the rest."""
        self._buildah("rm", "--all")
        self._buildah("rmi", "--all", "--force")

    def _buildah(self, *arguments: str) -> str:
        root, run = self._folder / "storage", self._folder / "run"
        return _run("buildah", f"--root={root}", f"--runroot={run}", *arguments)


@contextmanager
def temporary_store() -> Iterator[Store]:
    """Open an empty store, and leave nothing of it behind."""
    with tempfile.TemporaryDirectory(prefix="mixer-images-") as folder:
        store = Store(Path(folder))
        try:
            yield store
        finally:
            store.remove()


def disk_bytes(files: Path) -> int:
    """Return what a folder takes on disk, hard links counted once."""
    return 1024 * int(_run("du", "-xsk", str(files)).split()[0])


def _index_settings() -> str:
    """Return this machine's package index, if its pip is told of one."""
    index = os.environ.get("PIP_INDEX_URL")
    return f"index-url = {index}\n" if index else ""


def _run(*command: str) -> str:
    done = subprocess.run(
        command,
        env=os.environ | {"BUILDAH_ISOLATION": "chroot"},  # works where containers cannot nest
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout.strip()
