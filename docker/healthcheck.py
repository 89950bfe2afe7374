"""The container's health check: exits 0 when `/livez` answers 200, and needs no curl.

It asks for life, not readiness: a replica that drains or is full must not be restarted.
"""

import http.client
import os
import sys

TIMEOUT_S = 2  # below the image's health check timeout of 3 s, so that this is what ends it


def main() -> int:
    """Ask this container's own server."""
    port = int(os.environ.get("MIXER_PORT", "8000"))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/livez")
        return 0 if connection.getresponse().status == http.HTTPStatus.OK else 1
    except OSError:
        return 1


if __name__ == "__main__":
    sys.exit(main())
