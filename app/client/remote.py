"""Images through a running server: bounded, patient, and told apart what cannot be helped."""

import asyncio
import logging
import re
from typing import Any

import httpx2
from pydantic import BaseModel, ValidationError

from app.client.errors import ImageError, ServerError
from app.client.results import Prediction

logger = logging.getLogger(__name__)

# At least, after the first attempt that failed; doubled each time.
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
LONGEST_BUSY_WAIT_S = 4.0  # of a server that says when to come back, unless it says more
# So often one image may meet a connection that breaks, if the server is there. What is too large is
# refused while it is sent, and the break overtakes the refusal.
BREAKS = 3
MAX_PORT = 65_535
_USER = re.compile("//[^/]*@")  # and password: not for a log
# Ours, or of a balancer in front whose server is just starting.
BUSY = frozenset({408, 429, 502, 503, 504})


class _Name(BaseModel):
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


class _Answer(BaseModel):
    """What is needed of an answer of ours; a stranger's may be anything."""

    model: _Name
    predictions: list[Prediction]


class _Card(_Name):
    labels: list[str]


class RemoteClassifier:
    """Sends images to `POST /classify`; use it as an async context manager.

    Raises:
        ServerError: `url`, or a proxy that the environment names, is no address of a server.
    """

    def __init__(
        self, url: str, top_k: int, concurrency: int, retries: int, key: str | None
    ) -> None:
        headers = {}
        if key is not None:
            # For a gateway that looks there; user and password of a URL would go there, too.
            headers = {b"Authorization": f"Bearer {key}".encode(), b"X-API-Key": key.encode()}
        self._has_key = key is not None
        self._url = _USER.sub("//", url)
        self.concurrency = concurrency
        self._top_k = top_k
        self._retries = retries
        try:
            self._client = httpx2.AsyncClient(
                base_url=url.rstrip("/"),
                headers=headers,
                timeout=httpx2.Timeout(60, connect=10),
                limits=httpx2.Limits(max_connections=concurrency),
            )
        except httpx2.InvalidURL as error:
            raise ServerError(f"{self._url}: no address of a server ({error})") from None
        except OSError as error:
            raise ServerError(
                "the certificates of SSL_CERT_FILE, SSL_CERT_DIR or the system cannot be read "
                f"({error.strerror or error})"
            ) from None
        except (ValueError, ImportError) as error:
            raise ServerError(f"a proxy in the environment cannot be used: {error}") from None
        if (self._client.base_url.port or 0) > MAX_PORT:
            raise ServerError(f"{self._url}: no address of a server (ports end at {MAX_PORT})")
        if not self._client.base_url.host:
            raise ServerError(f"{self._url}: no address of a server (it names no host)")
        if self._client.base_url.query or self._client.base_url.fragment:
            raise ServerError(f"{self._url}: no address of a server (it has a query)")

    async def __aenter__(self) -> "RemoteClassifier":
        """Ask the server which model it serves.

        Raises:
            ServerError: it cannot be reached, wants a key, or is none of ours.
        """
        try:
            answer = await self._ask("GET", "/model")
            card = _Card.model_validate_json(answer.content)
            self.model = str(card)
            self.top_k = min(self._top_k, len(card.labels))
        except (ImageError, ValidationError) as error:
            await self._client.aclose()
            reason = "it has no model card" if isinstance(error, ValidationError) else error
            raise ServerError(f"{self._url}: no Mixer Serve there ({reason})") from None
        except ServerError:
            await self._client.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def classify(self, data: bytes) -> list[Prediction]:
        """Return an image's best labels.

        Raises:
            ImageError: the server refuses this image, stays busy, or gives no answer of ours.
            ServerError: it cannot be reached any more, wants a key, or serves another model now.
        """
        answer = await self._ask("POST", f"/classify?top_k={self.top_k}", data)
        try:
            found = _Answer.model_validate_json(answer.content)
        except ValidationError:
            raise ImageError("the answer cannot be read: it is no Mixer Serve's") from None
        if str(found.model) != self.model:
            raise ServerError(
                f"{self._url}: {found.model} is served there now, and the results are "
                f"those of {self.model}"
            )
        return found.predictions

    async def _is_there(self) -> bool:
        """Return whether the server answers what is small."""
        try:
            return (await self._client.get("/model")).is_success
        except httpx2.HTTPError:
            return False

    async def _ask(self, method: str, path: str, data: bytes | None = None) -> httpx2.Response:
        """Send one request, again as often and as late as it takes."""
        headers = {"Content-Type": "application/octet-stream"} if data is not None else {}
        wait_s = FIRST_WAIT_S / 2
        for attempt in range(self._retries + 1):
            last = attempt == self._retries
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            try:
                answer = await self._client.request(method, path, content=data, headers=headers)
            except (httpx2.LocalProtocolError, httpx2.UnsupportedProtocol):
                # For good, and not to be quoted: what cannot be sent may be a key.
                raise ServerError(f"{self._url}: no request can be sent") from None
            except httpx2.TransportError as error:
                tried = attempt == min(BREAKS, self._retries)
                if tried and data is not None and await self._is_there():
                    raise ImageError(
                        f"the server breaks off while these {len(data)} bytes are sent: they may "
                        "be too many"
                    ) from None
                if last:
                    reason = str(error) or type(error).__name__
                    raise ServerError(f"{self._url}: {reason}") from None
                if attempt == 1 and path == "/model":  # else nothing would be heard for minutes
                    logger.error("%s does not answer; trying again", self._url)  # noqa: TRY400 - see ServerError
                await asyncio.sleep(wait_s)
                continue
            except httpx2.RequestError as error:  # such as an unknown compression
                raise ImageError(f"the answer cannot be read: {error}") from None
            if answer.is_success:
                return answer
            if answer.status_code == 401 and self._has_key:
                raise ServerError("the server does not know this API key")
            if answer.status_code == 401:
                raise ServerError("the server wants an API key: give --api-key-file")
            if last or answer.status_code not in BUSY:
                raise ImageError(_detail(answer))
            # Among many who come back after the second that they were told, some would lose always.
            asked_s = _retry_after_s(answer)
            longest_s = LONGEST_BUSY_WAIT_S if asked_s else LONGEST_WAIT_S
            await asyncio.sleep(max(asked_s, min(wait_s, longest_s)))
        raise AssertionError("the last attempt returns or raises")


def _retry_after_s(answer: httpx2.Response) -> float:
    """Return how long the server asks to wait (RFC 9110, section 10.2.3, in seconds)."""
    asked = answer.headers.get("retry-after", "")
    return min(float(asked), LONGEST_WAIT_S) if asked.isdecimal() else 0.0


def _detail(answer: httpx2.Response) -> str:
    try:
        problem: dict[str, Any] = answer.json()
        return str(problem["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"status {answer.status_code}"
