"""`POST /classify` by the short way and by the framework's: the client cannot tell them apart."""

import pytest
from fastapi import Request, Response
from starlette.testclient import TestClient

from app.routes.classify import classify
from tests.fakes import make_image

# A parameter that nobody knows makes a request unusual: it takes the long way.
LONG = "&detour=1"


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Return the `top_k` of each request that takes the short way."""
    seen: list[int | None] = []

    async def watched(request: Request, top_k: int | None) -> Response:
        seen.append(top_k)
        return await classify(request, top_k)

    monkeypatch.setattr("app.shortcut.classify", watched)
    return seen


@pytest.mark.parametrize(
    ("query", "expected"),
    [("", [None]), ("top_k=2", [2]), ("top_k=02", []), ("top_k=x", []), ("top_k=2&top_k=3", [])],
)
def test_which_requests_take_it(
    client: TestClient, taken: list[int | None], query: str, expected: list[int | None]
) -> None:
    """Only a request without parameters, or with a plain `top_k`, takes the short way."""
    client.post(f"/classify?{query}", content=make_image())
    client.get(f"/classify?{query}")
    assert taken == expected


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("top_k=2", make_image()),
        ("top_k=9", make_image()),
        ("top_k=2", b""),
        ("top_k=2", b"not an image"),
        ("top_k=2", make_image()[:60]),
    ],
    ids=["answered", "top_k too high", "empty", "foreign", "truncated"],
)
def test_both_ways_answer_alike(
    client: TestClient, taken: list[int | None], query: str, body: bytes
) -> None:
    """Status, body and header names are the same by either way, for answers and problems."""
    short = client.post(f"/classify?{query}", content=body)
    assert len(taken) == 1
    long = client.post(f"/classify?{query}{LONG}", content=body)
    assert len(taken) == 1
    assert short.status_code == long.status_code
    assert short.json() == long.json()
    assert set(short.headers) == set(long.headers)


def test_both_ways_count_as_the_same_route(client: TestClient) -> None:
    """The metrics know one route, whichever way its requests took."""
    client.post("/classify", content=make_image())
    client.post(f"/classify?top_k=1{LONG}", content=make_image())
    assert 'route="/classify",status="200"} 2.0' in client.get("/metrics").text
