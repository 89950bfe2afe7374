"""API keys: several at once, so that they can be rotated, reread when their file changes."""

import hashlib
import hmac
import itertools
import logging
import stat
import time
from pathlib import Path

from fastapi import Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.datastructures import Headers

from app.errors import StartupError

logger = logging.getLogger(__name__)

# How soon a changed file counts; looking costs a microsecond, so once a second is free.
RELOAD_PERIOD_S = 1.0
# A thousand keys: every request is compared with all of them, and the event loop reads the file.
MAX_BYTES = 64 * 1024
# How the OpenAPI document names the two ways to send a key; neither checks it.
KEY_SCHEMES = [
    Security(HTTPBearer(auto_error=False)),
    Security(APIKeyHeader(name="X-API-Key", auto_error=False)),
]


class ApiKeys:
    """The keys of one file, as `read_keys` finds them.

    Raises:
        StartupError: the file cannot be read or holds no key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checked_at = time.monotonic()
        try:
            self._stamp = self._look()
            self._digests = self._read()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise StartupError(
                f"MIXER_API_KEYS_FILE={path}: {reason}; give a file with a key a line"
            ) from error

    def allow(self, headers: Headers) -> bool:
        """Return whether the request carries a known key, in constant time for each.

        A token in `Authorization` may be another's, a gateway's say: then `X-API-Key` counts, too.
        """
        self._reload()
        scheme, _, token = headers.get("authorization", "").partition(" ")
        keys = [token] if scheme.lower() == "bearer" else []
        keys.append(headers.get("x-api-key", ""))
        # The framework reads bytes of a header as Latin-1; the file is UTF-8.
        digests = [hashlib.sha256(key.strip(" \t").encode("latin-1")).digest() for key in keys]
        # Digests are of one length, and no comparison ends early: time tells nothing of a key.
        pairs = itertools.product(digests, self._digests)
        return any([hmac.compare_digest(*pair) for pair in pairs])  # noqa: C419 - a generator would stop at the first match

    def _reload(self) -> None:
        now = time.monotonic()
        if now - self._checked_at < RELOAD_PERIOD_S:
            return
        self._checked_at = now
        try:
            found = self._look()
            if found != self._stamp:
                self._digests = self._read()
                self._stamp = found
                logger.info("API keys reread: %d", len(self._digests))
        except (OSError, ValueError) as error:
            logger.error("API keys kept as they were, the file cannot be read: %s", error)  # noqa: TRY400 - no traceback for an operator's slip

    def _look(self) -> tuple[int, ...]:
        """Return what changes with the file, unless reading it would take its time."""
        status = self._path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino

    def _read(self) -> list[bytes]:
        return [hashlib.sha256(key.encode()).digest() for key in read_keys(self._path)]


def read_keys(path: Path) -> list[str]:
    """Return the keys of a file: one a line, without empty lines and those that begin with #.

    Raises:
        OSError, ValueError: it cannot be read as UTF-8, or holds no key.
    """
    lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError("the file holds no key")
    return keys
