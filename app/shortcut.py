"""The short way of the one request that everything is about: `POST /classify`.

Routing, dependency solving and the exception layers of the framework cost a third of what this
process spends on such a request outside decoding and inference. So the request that carries
nothing for them goes straight to its endpoint; whatever is unusual about one takes the long way,
which answers alike.
"""

import re

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from app.routes.classify import classify
from app.trace import current

_PATH = "/classify"
# A number that needs no checking but against the model's classes, which the endpoint does.
_QUERY = re.compile(rb"(?:top_k=([1-9][0-9]{0,5}))?")


class Shortcut:
    """ASGI middleware inside all others; a Problem that it lets through is answered by the door."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, by the short way if it can take it."""
        query = (
            _QUERY.fullmatch(scope["query_string"])
            if scope["type"] == "http" and scope["path"] == _PATH and scope["method"] == "POST"
            else None
        )
        if query is None:
            await self._app(scope, receive, send)
            return
        top_k = None if query[1] is None else int(query[1])
        try:
            answer = await classify(Request(scope, receive), top_k)
        except ClientDisconnect:
            trace = current()
            if trace is not None:
                trace.problem = "client-gone"
            return
        await answer(scope, receive, send)
