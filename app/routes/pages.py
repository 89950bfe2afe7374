"""What people see: the page at `/`, `/docs` and `/redoc`, all of it served from here.

Each has a Content-Security-Policy that lets it run our own files and nothing else.
"""

import hashlib
import secrets
from functools import cache, lru_cache
from pathlib import Path

import fastapi_offline
from fastapi import APIRouter, FastAPI, Request, Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from app.answers import InPieces

router = APIRouter(include_in_schema=False)

_STATIC = Path(__file__).parent.parent / "static"
# Swagger UI (Apache-2.0) and Redoc (MIT) as published, from the package that carries them.
_VENDORED = Path(fastapi_offline.__file__).parent / "static"
_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_FILES = {
    **{file.name: file for file in _STATIC.iterdir() if file.suffix != ".html"},
    **{
        name: _VENDORED / name
        for name in ("swagger-ui-bundle.js", "swagger-ui.css", "redoc.standalone.js")
    },
}
_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' {images}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Two style elements that Redoc 2.5 makes before it has read the nonce, one of them empty.
_REDOC_STYLES = (
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=' "
    "'sha256-QMIg+bpjm3JdElJ388KYke01izlUW0UoNOeKjpMxdgc='"
)


@router.get("/")
async def page() -> Response:
    """Show the page that classifies what is dropped on it."""
    return _html("index.html", _CSP.format(images="blob:"))


@router.get("/docs")
async def docs() -> Response:
    """Show the API in Swagger UI, to be tried out."""
    return _html("docs.html", _CSP.format(images="data: blob:"))


@router.get("/redoc")
async def redoc() -> Response:
    """Show the API in Redoc, to be read; its styles are made at run time, hence the nonce."""
    nonce = secrets.token_urlsafe(16)
    styles = f"style-src 'self' 'nonce-{nonce}' {_REDOC_STYLES}"
    policy = _CSP.format(images="data:").replace("style-src 'self'", styles)
    return _html("redoc.html", policy, nonce)


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """Show the API to programs."""
    return InPieces(_document(request.app), media_type="application/json", is_shared=True)


@router.get("/static/{name}")
async def static(request: Request, name: str) -> Response:
    """Return one of the pages' files; a browser asks each time and is told if it has it."""
    if name not in _FILES:
        raise HTTPException(404)
    content, tag = _read(name)
    headers = {"ETag": tag, "Cache-Control": "no-cache"}
    if is_known(tag, request.headers.getlist("if-none-match")):
        return Response(status_code=304, headers=headers)
    media_type = _TYPES[_FILES[name].suffix]
    return InPieces(content, media_type=media_type, headers=headers, is_shared=True)


_MAX_TAGS_BYTES = 1024  # of which a browser sends 18; more are not worth the event loop's time


def is_known(tag: str, held: list[str]) -> bool:
    """Return whether `If-None-Match` names the tag, weak or not, or any (RFC 9110, 13.1.2)."""
    if sum(map(len, held)) > _MAX_TAGS_BYTES:
        return False
    tags = {one.strip().removeprefix("W/") for line in held for one in line.split(",")}
    return bool(tags & {tag, "*"})


@lru_cache(maxsize=1)
def _document(app: FastAPI) -> bytes:
    return to_json(app.openapi())


@cache
def _read(name: str) -> tuple[bytes, str]:
    """Return a file and its entity tag; 3 MB in all, and the disk is asked once."""
    content = _FILES[name].read_bytes()
    return content, f'"{hashlib.sha256(content).hexdigest()[:16]}"'


@cache
def _template(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


def _html(name: str, policy: str, nonce: str = "") -> Response:
    text = _template(name).replace("NONCE", nonce)
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    return Response(text, media_type="text/html", headers=headers)
