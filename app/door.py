"""The first thing a request meets: who may come in, how many at once.

Pure ASGI, since Starlette's BaseHTTPMiddleware hides a client's disconnect; and before the routing,
so that under overload a refusal costs as little as it can.
"""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.errors import NotReady, Problem, Unauthorized
from app.keys import ApiKeys
from app.routes.problems import answer_to, problem_response
from app.service import Service

# Orchestrators, balancers and Prometheus come without a key; what they see tells of no image.
OPEN_PATHS = frozenset({"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"})
# What a browser loads before it can send a key; it is the same for everybody.
PAGES = frozenset({"/", "/docs", "/redoc", "/openapi.json"})


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
        if scope["method"] == "HEAD":  # the server leaves the body out (RFC 9110, 9.3.2)
            scope = {**scope, "method": "GET"}

        try:
            if scope["path"] in OPEN_PATHS or _is_page(scope):
                await self._app(scope, receive, send)
                return
            if self._keys is not None and not self._keys.allow(Headers(scope=scope)):
                raise Unauthorized
            if scope["method"] != "POST":
                await self._app(scope, receive, send)
                return
            if not service.classifier.is_ready:  # a balancer may try another one; 500 ends it
                raise NotReady("This replica's engine or decoders have failed too often.")
            with service.admission.request():
                await self._app(scope, receive, send)
        except Problem as problem:
            await answer_to(scope, problem)(scope, receive, send)


class Origins(CORSMiddleware):
    """Starlette's middleware for pages of other origins; what it refuses is a problem, too."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a browser that asks whether it may."""
        answer = super().preflight_response(request_headers)
        if answer.status_code == 200:
            return answer
        kept = {k: v for k, v in answer.headers.items() if not k.startswith("content-")}
        detail = f"{bytes(answer.body).decode()}."
        return problem_response(answer.status_code, detail, headers=kept)


def _is_page(scope: Scope) -> bool:
    """Return whether a browser asks for a page, which asks for the key in turn."""
    path: str = scope["path"]
    return scope["method"] == "GET" and (path in PAGES or path.startswith("/static/"))
