"""Every error as RFC 9457 problem+json, the framework's own included."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from app.errors import CLIENT_GONE, GONE, PROBLEM_JSON, Problem, kind_of, problem_body
from app.trace import current


def answer_errors(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Register the handlers; what none of them knows is a bug, which access.py answers."""

    @app.exception_handler(Problem)
    async def on_problem(request: Request, error: Problem) -> Response:
        return answer_to(request.scope, error)

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        detail = f"{error.detail}."
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the framework names the methods of one route only
            headers["Allow"] = _allowed(routes, request.scope) or headers["Allow"]
        return _answer(request.scope, error.status_code, detail, headers=headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        detail = f"{first['loc'][-1]}: {first['msg']}."
        return _answer(request.scope, 422, detail, "Invalid parameter")

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(_: Request, _error: ClientDisconnect) -> Response:
        trace = current()
        if trace is not None:
            trace.problem = GONE
        return Response(status_code=CLIENT_GONE)  # nobody is there to read it


def _allowed(routes: Sequence[BaseRoute], scope: Scope) -> str:
    """Return the methods of all routes with the request's path (RFC 9110, 15.5.6)."""
    found = {
        method
        for route in routes
        if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE
        for method in route.methods or ()
    }
    return ", ".join(sorted(found | ({"HEAD"} if "GET" in found else set())))


def answer_to(scope: Scope, problem: Problem) -> JSONResponse:
    """Return the answer that a problem is, and note it in the request's trace."""
    trace = current()
    if trace is not None:
        trace.reason = problem.reason
    return _answer(scope, problem.status, problem.detail, problem.title, problem.headers)


def _answer(
    scope: Scope,
    status: int,
    detail: str,
    title: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    title = title or HTTPStatus(status).phrase
    trace = current()
    if trace is not None:
        trace.problem = kind_of(title)
    # The Open Inference Protocol's clients and Hugging Face's, which post to /, show what is in
    # `error`; RFC 9457 allows members of one's own.
    is_foreign = scope["path"] == "/" or scope["path"].startswith("/v2")
    extra = {"error": detail} if is_foreign else {}
    return problem_response(status, detail, title, headers, extra)


def problem_response(
    status: int,
    detail: str,
    title: str | None = None,
    headers: Mapping[str, str] | None = None,
    extra: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Return the `application/problem+json` answer; the title defaults to the status phrase.

    `extra` are members besides RFC 9457's own.
    """
    return JSONResponse(
        {**problem_body(status, title or HTTPStatus(status).phrase, detail), **(extra or {})},
        status_code=status,
        headers=dict(headers or {}),
        media_type=PROBLEM_JSON.decode(),
    )
