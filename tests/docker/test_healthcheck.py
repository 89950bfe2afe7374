"""The image's health check against a real service."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, clean_environment, serving

EVERYWHERE = ("0.0.0.0", "::", "*")  # noqa: S104 - as in the image


def check(**settings: str) -> int:
    """Return the exit code of the health check in a container with these settings."""
    command = [sys.executable, str(ROOT / "docker" / "healthcheck.py")]
    return subprocess.run(command, env=clean_environment(**settings), check=False).returncode


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", *EVERYWHERE])
def test_asks_where_the_service_listens(tmp_path: Path, host: str) -> None:
    """A service that lives is found on the address that it was told, and nobody elsewhere."""
    if host == "::":
        try:
            with socket.create_server(
                ("::", 0), family=socket.AF_INET6, dualstack_ipv6=True
            ) as probe:
                socket.create_connection(("127.0.0.1", probe.getsockname()[1])).close()
        except OSError:
            pytest.skip("this machine has no IPv6, or keeps it apart")
    with serving(tmp_path / "log", MIXER_HOST=host) as server:
        port = server.url.rpartition(":")[2]
        assert check(MIXER_HOST=host, MIXER_PORT=port) == 0
        assert check(MIXER_HOST=host, MIXER_PORT=f"{port}.0") == 0
        assert check(MIXER_HOST="127.0.0.3", MIXER_PORT=port) == (host not in EVERYWHERE)
    assert check(MIXER_HOST=host, MIXER_PORT=port) == 1
