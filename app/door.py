"""The first thing a request meets: who may come in, how many at once, what every answer carries.

Pure ASGI, since Starlette's BaseHTTPMiddleware hides a client's disconnect; and before the routing,
so that under overload a refusal costs as little as it can.
"""

import asyncio

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import NotReady, Problem, Unauthorized, problem_response
from app.keys import ApiKeys
from app.service import Service

# Orchestrators and balancers probe without a key.
OPEN_PATHS = frozenset({"/livez", "/readyz"})
# The answers are data, never a page: nothing in them may run, be framed or be sniffed.
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
}


class Door:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, keys: ApiKeys | None) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request in, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service: Service = scope["app"].state.service

        async def send_dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                if service.draining:
                    headers["Connection"] = "close"  # the client's next request goes elsewhere
            await send(message)

        try:
            if scope["path"] in OPEN_PATHS:
                await self._app(scope, receive, send_dressed)
                return
            if self._keys is not None and not self._keys.allow(Headers(scope=scope)):
                raise Unauthorized
            if scope["method"] != "POST":
                await self._app(scope, receive, send_dressed)
                return
            with service.admission.request():
                await self._app(scope, receive, send_dressed)
        except (Problem, asyncio.CancelledError) as error:
            answer = _answer(error, service)
            if answer is None:
                raise
            await answer(scope, receive, send_dressed)


def _answer(error: BaseException, service: Service) -> Response | None:
    if isinstance(error, Problem):
        return problem_response(error.status, error.detail, error.title, error.headers)
    if service.draining:  # cancelled, since the grace time is over
        stopped = NotReady("This replica had to stop before the request was done.")
        return problem_response(stopped.status, stopped.detail, stopped.title)
    return None
