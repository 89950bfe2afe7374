"""Promise 13: who may come in, what every answer carries, what nobody ever reads in the log."""

import json
import os
import secrets
import time
from pathlib import Path

import pytest

from app.door import OPEN_PATHS
from tests.fakes import make_image
from tests.faults.conftest import Figure, Start
from tests.faults.load import Answer, dial, get, one, post, until

OLD, NEW = "old-key-4f1d", "new-key-93ab"
HEADERS = ("X-Content-Type-Options", "X-Frame-Options", "Referrer-Policy", "Cache-Control")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """Return a file of one API key."""
    path = tmp_path / "keys"
    path.write_text(f"# the first one\n{OLD}\n")
    return path


def test_document_names_the_key_where_one_is_wanted(fake: Start, keys: Path) -> None:
    """With keys the OpenAPI document shows both ways to send one, without keys none."""
    for settings in ({"api_keys_file": keys}, {}):
        with fake(**settings) as server:
            document = json.loads(one(server.url, get("/openapi.json")).body)
            schemes = document["components"].get("securitySchemes", {})
            assert {scheme["type"] for scheme in schemes.values()} == (
                {"http", "apiKey"} if settings else set()
            )
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    is_guarded = path not in OPEN_PATHS
                    assert ("security" in operation) is (is_guarded and bool(settings)), path
                    assert ("401" in operation["responses"]) is is_guarded, path


def test_keys(fake: Start, keys: Path) -> None:
    """Without a known key all but health and pages is a 401 problem; both ways to send one do."""
    with fake(api_keys_file=keys) as server:
        posts = (
            "/classify",
            "/classify?x",
            "/classify/batch",
            "/explain",
            "/",
            "/v2/models/m/infer",
        )
        for request in (
            *(post(make_image(), path) for path in posts),
            *(get(path) for path in ("/model", "/nowhere", "/v2", "/v2/models/fake")),
        ):
            answer = one(server.url, request)
            assert answer.status == 401
            assert answer.header("Content-Type") == "application/problem+json"
            assert answer.header("WWW-Authenticate") == "Bearer"
        for wrong in ("", "x", OLD[:-1], OLD + "x", OLD.upper(), "# the first one"):
            assert one(server.url, post(make_image(), X_API_Key=wrong)).status == 401
            bearer = post(make_image(), Authorization=f"Bearer {wrong}")
            assert one(server.url, bearer).status == 401
        assert one(server.url, post(make_image(), X_API_Key=OLD)).status == 200
        assert one(server.url, post(make_image(), Authorization=f"bearer {OLD}")).status == 200
        for token in ("", "a.gateway's.own"):
            both = post(make_image(), X_API_Key=OLD, Authorization=f"Bearer {token}")
            assert one(server.url, both).status == 200
        foreign = post(make_image(), X_API_Key="x", Authorization="Bearer y")
        assert one(server.url, foreign).status == 401
        for path in ("/livez", "/readyz"):
            assert one(server.url, get(path)).status == 200


def test_keys_of_other_alphabets(fake: Start, keys: Path) -> None:
    """A key file may begin with a byte order mark, and hold keys that are no ASCII."""
    keys.write_text("first\nclé-ключ\nclà\nkey\u0420\n", encoding="utf-8-sig")
    with fake(api_keys_file=keys) as server:
        assert one(server.url, post(make_image(), X_API_Key="first")).status == 200
        for key in (
            "clé-ключ",
            "clà",
            "key\u0420",
        ):  # the last two end in a byte that may be a space
            request = post(make_image(), X_API_Key="KEY").replace(b"KEY", key.encode())
            assert one(server.url, request).status == 200


def test_keys_are_rotated_without_a_restart(fake: Start, keys: Path, figure: Figure) -> None:
    """A new key counts within two seconds beside the old one, which a later change ends."""
    with fake(api_keys_file=keys) as server:

        def wait_for(key: str, status: int) -> float:
            start = time.monotonic()
            while one(server.url, post(make_image(), X_API_Key=key)).status != status:
                assert time.monotonic() < start + 2
                time.sleep(0.05)
            return time.monotonic() - start

        keys.write_text(f"{OLD}\n{NEW}\n")
        figure(f"the new key counts after {wait_for(NEW, 200):.1f} s")
        assert one(server.url, post(make_image(), X_API_Key=OLD)).status == 200
        keys.write_text(f"{NEW}\n")
        wait_for(OLD, 401)
        # An operator's slip locks nobody out, nobody in, and holds nothing up.
        for slip in (
            lambda: keys.write_text(""),
            lambda: keys.write_text("x\n" * 100_000),
            keys.unlink,
            lambda: os.mkfifo(keys),
        ):
            slip()
            time.sleep(1.2)
            assert one(server.url, post(make_image(), X_API_Key=NEW)).status == 200
            assert one(server.url, post(make_image(), X_API_Key="")).status == 401
        keys.unlink()
        later = keys.with_suffix(".new")
        later.write_text(f"{OLD}\n")
        later.rename(keys)
        wait_for(OLD, 200)


def test_security_headers(fake: Start, keys: Path) -> None:
    """Every answer carries the security headers, refusals below the application included."""
    huge = post(b"", X=70_000 * "x")
    image = post(make_image())
    late = post(make_image(), X_Request_Timeout_Ms="1")
    oversize = post(b"").replace(b"Content-Length: 0", b"Content-Length: 999999999")
    form = {"Content_Type": "multipart/form-data; boundary=b"}
    parts = b'--b\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--b--\r\n'
    expected = [
        *((get(path), 200) for path in ("/", "/docs", "/livez", "/readyz", "/metrics", "/model")),
        *((get(path), 200) for path in ("/openapi.json", "/v2/health/live", "/static/page.js")),
        (post(parts, "/classify/batch", **form), 200),
        (image, 200),
        (late, 504),
        (oversize, 413),
        (huge, 431),
        (get("/livez?" + "a&" * 600), 414),
        (get("/nowhere"), 404),
        (get("/classify"), 405),
        (post(b""), 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /livez", 408),
        (post(b"x"), 415),
        (post(make_image()[:50]), 422),
        (image.replace(b"/classify", b"/classify?top_k=0"), 422),
        (get("/observed?fault=raise"), 200),
        (image, 500),
    ]
    with fake(batch_ms=50, header_timeout_s=2) as server:
        for request, status in expected:
            answer = one(server.url, request)
            assert answer.status == status, request[:80]
            _assert_secure(answer)
    with fake(api_keys_file=keys, max_requests=1) as server, dial(server.url) as waiting:
        _assert_secure(one(server.url, image))  # 401
        waiting.sendall(post(b"", X_API_Key=OLD).replace(b"Length: 0", b"Length: 9"))
        until(lambda: one(server.url, post(b"", X_API_Key=OLD)).status == 429)
        _assert_secure(one(server.url, post(b"", X_API_Key=OLD)))


def _assert_secure(answer: Answer) -> None:
    assert all(answer.header(name) for name in HEADERS), answer.head
    assert "frame-ancestors 'none'" in answer.header("Content-Security-Policy"), answer.head
    assert not answer.header("Server")


def test_cors_is_off_unless_configured(fake: Start) -> None:
    """No other origin may call the service, unless it is named."""
    asked = {"Origin": "https://shop.example", "Access_Control_Request_Method": "POST"}
    preflight = post(b"", **asked).replace(b"POST /", b"OPTIONS /", 1)
    with fake() as server:
        for request in (preflight, post(make_image(), Origin="https://shop.example")):
            assert not one(server.url, request).header("Access-Control-Allow-Origin")
    with fake(cors_origins="https://shop.example") as server:
        for request in (preflight, post(make_image(), Origin="https://shop.example")):
            allowed = one(server.url, request).header("Access-Control-Allow-Origin")
            assert allowed == "https://shop.example"
        foreign = one(server.url, post(make_image(), Origin="https://evil.example"))
        assert not foreign.header("Access-Control-Allow-Origin")
        refused = one(server.url, preflight.replace(b"shop.", b"evil."))
        assert (refused.status, refused.header("Content-Type")) == (400, "application/problem+json")
        assert json.loads(refused.body)["detail"] == "Disallowed CORS origin."
        assert not refused.header("Access-Control-Allow-Origin")
        assert refused.header("Vary")


def test_nothing_of_a_user_in_the_log(fake: Start, keys: Path, tmp_path: Path) -> None:
    """Neither image, file name nor key of any request is in the log, whatever went wrong."""
    secret = secrets.token_hex(8)
    path = tmp_path / secret
    form = (
        f'--b\r\nContent-Disposition: form-data; name="file"; filename="{path}"\r\n\r\n'
    ).encode()
    multipart = {"Content_Type": "multipart/form-data; boundary=b"}
    bad = secret.encode() * 10
    with fake(api_keys_file=keys, log_level="debug") as server:
        for key in (OLD, secret):
            headers = {"X_API_Key": key}
            good = form + make_image() + b"\r\n--b--\r\n"
            one(server.url, post(good, **headers, **multipart))
            one(server.url, post(form + bad + b"\r\n--b--\r\n", **headers, **multipart))
            one(server.url, post(form + bad, **headers, **multipart))
            one(server.url, post(bad, **headers))
            one(server.url, post(make_image() + bad, **headers))
            one(server.url, get(f"/classify?key={secret}"))
        breaking = get("/observed?fault=raise")
        one(server.url, breaking.replace(b"Host", f"X-API-Key: {OLD}\r\nHost".encode()))
        one(server.url, post(form + make_image() + b"\r\n--b--\r\n", X_API_Key=OLD, **multipart))
        log = server.log.read_text()
        assert "ordered to fail" in log  # it does log
        assert secret not in log
        assert OLD not in log
        assert not path.exists()
