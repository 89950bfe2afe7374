"""The container's health check: exits 0 when `/livez` answers 200, and needs no curl.

It asks for life, not readiness: a replica that drains or is full must not be restarted.
"""

import http.client
import os
import sys

EVERYWHERE = ("0.0.0.0", "::", "*", "")  # noqa: S104 - compared with, not bound to
LOOPBACK = "127.0.0.1"
TIMEOUT_S = 2  # below the image's health check timeout of 3 s, so that this is what ends it


def main() -> int:
    """Ask this container's own server."""
    host = os.environ.get("MIXER_HOST", EVERYWHERE[0])
    port = int(float(os.environ.get("MIXER_PORT", "8000")))  # the settings take 8000.0, too
    connection = http.client.HTTPConnection(
        LOOPBACK if host in EVERYWHERE else host, port, timeout=TIMEOUT_S
    )
    try:
        connection.request("GET", "/livez")
        return 0 if connection.getresponse().status == http.HTTPStatus.OK else 1
    except OSError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
