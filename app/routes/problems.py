"""Every error as RFC 9457 problem+json, the framework's own included."""

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.errors import Problem, problem_response


def answer_errors(app: FastAPI) -> None:
    """Register the handlers."""

    @app.exception_handler(Problem)
    async def on_problem(_: Request, error: Problem) -> Response:
        return problem_response(error.status, error.detail, error.title, error.headers)

    @app.exception_handler(HTTPException)
    async def on_http_exception(_: Request, error: HTTPException) -> Response:
        return problem_response(error.status_code, f"{error.detail}.", headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        detail = f"{first['loc'][-1]}: {first['msg']}."
        return problem_response(422, detail, "Invalid parameter")

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(_: Request, _error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nginx's word for it; nobody is there to read it

    @app.exception_handler(Exception)
    async def on_bug(_: Request, _error: Exception) -> Response:
        return problem_response(500, "The service has a fault; its log has the details.")
