"""The pages as HTTP sees them; test_browser.py uses them as a person does."""

import re

import pytest
from starlette.testclient import TestClient

PAGES = ("/", "/docs", "/redoc")


@pytest.mark.parametrize("path", PAGES)
def test_policy_is_strict(client: TestClient, path: str) -> None:
    """A page may run our own files, and neither inline scripts nor a foreign host's."""
    answer = client.get(path)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", PAGES)
def test_everything_is_served_from_here(client: TestClient, path: str) -> None:
    """Whatever a page loads is a file of ours that exists."""
    text = client.get(path).text
    assert "http" not in text.replace("http-equiv", "")
    files = re.findall(r'(?:src|href)="(static/[^"]+)"', text)
    assert files
    for file in files:
        answer = client.get(f"/{file}")
        assert answer.status_code == 200, file
        assert len(answer.content) > 100


def test_redoc_nonce_is_fresh(client: TestClient) -> None:
    """The nonce of /redoc is another one each time, the same in header and page."""
    nonces = set()
    for _ in range(2):
        answer = client.get("/redoc")
        [nonce] = re.findall(r"'nonce-([^']+)'", answer.headers["content-security-policy"])
        assert f'nonce="{nonce}"' in answer.text
        nonces.add(nonce)
    assert len(nonces) == 2


def test_files_are_sent_once(client: TestClient) -> None:
    """A browser that has a file gets 304 for it."""
    first = client.get("/static/page.js")
    tag = first.headers["etag"]
    for held in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = client.get("/static/page.js", headers={"If-None-Match": held})
        assert again.status_code == 304
        assert not again.content
    for more in ('"other"', f"{tag}, " * 100):  # of so many none is looked for
        other = client.get("/static/page.js", headers={"If-None-Match": more})
        assert other.content == first.content


@pytest.mark.parametrize("name", ["nothing.js", "index.html", "..%2fmain.py", "%2e%2e/main.py"])
def test_other_files_are_not_served(client: TestClient, name: str) -> None:
    """What is not on the list of the pages' files is a 404 problem."""
    answer = client.get(f"/static/{name}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_openapi_has_an_example_for_everything(client: TestClient) -> None:
    """Each request body and each error of the OpenAPI document has an example."""
    document = client.get("/openapi.json").json()
    seen = 0
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for media in operation.get("requestBody", {}).get("content", {}).values():
                assert "example" in media or "examples" in media, path
                seen += 1
            for status, answer in operation["responses"].items():
                if int(status) < 400:
                    continue
                for media in answer["content"].values():
                    assert media["examples"], (path, status)
                    for example in media["examples"].values():
                        assert example["value"]["status"] == int(status), (path, status)
                        seen += 1
    assert seen > 50
