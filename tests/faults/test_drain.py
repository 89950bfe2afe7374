"""Promise 9: stopping is something that no client notices."""

import asyncio
import contextlib
import os
import signal
import socket
import statistics
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvloop
from starlette.types import Message, Receive, Scope, Send

from app.access import Access
from app.metrics import Metrics
from tests.fakes import make_image
from tests.faults.conftest import Figure, Start
from tests.faults.load import REFUSED, Load, dial, get, one, post, read_answer, until
from tests.processes import Server, serving

TIMES = 20
DRAIN_S = 0.6


async def stop_under_load(server: Server) -> dict[str, float]:
    """Send SIGTERM to a server under load, as a balancer in front of it sees it."""
    load = Load(server.url)
    probes = Load(server.url)
    running = asyncio.create_task(load.run([post(make_image())], 150, 30))
    await asyncio.sleep(0.4)
    server.process.send_signal(signal.SIGTERM)
    signalled = time.monotonic()
    while (await probes.one(get("/readyz"))).status == 200:
        await asyncio.sleep(0.005)
    unready_s = time.monotonic() - signalled
    # The balancer notices a little later; until then it goes on sending.
    await asyncio.sleep(DRAIN_S - 0.2 - unready_s)
    running.cancel()
    await load.settle(10)
    served = [a for a in load.answers if a.due > signalled + unready_s]
    kept = [a for a in served if b"connection: close" not in a.head.lower()]
    while server.process.poll() is None and time.monotonic() < signalled + 20:
        await asyncio.sleep(0.01)
    return {
        "unready_ms": unready_s * 1000,
        "failed": sum(a.status != 200 for a in load.answers),
        "served while draining": len(served),
        "kept alive": len(kept),
        "exit_s": time.monotonic() - signalled,
        "exit code": float(server.process.returncode if server.process.poll() is not None else 99),
    }


@pytest.mark.slow
def test_sigterm_under_load_20_times(fake: Start, figure: Figure) -> None:
    """20 times SIGTERM under load: readiness fails at once, no request does."""
    rounds = []
    for _ in range(TIMES):
        with fake(batch_ms=10, drain_delay_s=DRAIN_S) as server:
            rounds.append(uvloop.run(stop_under_load(server)))
            assert "Traceback" not in server.log.read_text()
    worst = {name: max(r[name] for r in rounds) for name in rounds[0]}
    figure(
        f"unready after {statistics.median(r['unready_ms'] for r in rounds):.0f} ms (worst "
        f"{worst['unready_ms']:.0f}), {sum(r['failed'] for r in rounds):.0f} failed, "
        f"{sum(r['served while draining'] for r in rounds):.0f} served while draining, "
        f"gone after {worst['exit_s']:.1f} s"
    )
    assert worst["failed"] == 0
    assert worst["unready_ms"] < 100
    assert min(r["served while draining"] for r in rounds) > 0
    assert worst["kept alive"] == 0
    assert worst["exit code"] == 0
    assert worst["exit_s"] < DRAIN_S + 5


@pytest.mark.slow
def test_clients_that_never_look(real: Start, photos: list[bytes], figure: Figure) -> None:
    """Clients that send to the very end are answered, or find nobody; nothing else happens."""

    async def run(server: Server) -> list[int]:
        load = Load(server.url)
        running = asyncio.create_task(load.run([post(p) for p in photos], 60, 30))
        await asyncio.sleep(1)
        server.process.send_signal(signal.SIGTERM)
        while server.process.poll() is None:
            await asyncio.sleep(0.02)
        running.cancel()
        await load.settle(10)
        return [a.status for a in load.answers]

    statuses: list[int] = []
    for _ in range(5):
        with real(drain_delay_s=0.5) as server:
            statuses += uvloop.run(run(server))
    figure(f"in 5 stops {dict(Counter(statuses))}, {REFUSED} being nobody there")
    assert statuses.count(200) > 5 * 30
    assert set(statuses) <= {200, REFUSED}


def test_many_descriptors(tmp_path: Path) -> None:
    """A service that was started with a thousand descriptors open stops as any other."""
    (tmp_path / "many.py").write_text(
        "import os, sys\n"
        "from app import serve\n"
        "for _ in range(1100):\n"
        "    os.open(os.devnull, os.O_RDONLY)\n"
        "sys.exit(serve.main())\n"
    )
    with serving(tmp_path / "log", module="many", PYTHONPATH=str(tmp_path)) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0
        assert "Traceback" not in server.log.read_text()


def test_stuck_upload(fake: Start, figure: Figure) -> None:
    """An upload that never ends does not hold the exit up longer than the grace time."""
    with fake(drain_delay_s=0.2, grace_s=1) as server, dial(server.url) as stuck:
        stuck.sendall(b"POST /classify HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\nx")
        time.sleep(0.1)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(10)
        took_s = time.monotonic() - start
        answer = read_answer(stuck)
        figure(f"gone after {took_s:.2f} s of 1.2, the upload answered {answer[9:12].decode()}")
        assert code == 0
        assert took_s < 3
        assert b" 503 " in answer
        assert "Traceback" not in server.log.read_text()


def test_stuck_decoder(fake: Start, figure: Figure) -> None:
    """A decoder that hangs does not hold the exit up; its request is answered, the log tells."""
    with fake(drain_delay_s=0.2, grace_s=1) as server, dial(server.url) as waiting:
        one(server.url, post(make_image()))
        decoders = server.pids()[2:]
        for pid in decoders:
            os.kill(pid, signal.SIGSTOP)
        waiting.sendall(post(make_image()))
        time.sleep(0.1)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(15)
        figure(f"gone after {time.monotonic() - start:.2f} s of 1.2 and 3 for what is stuck")
        for (
            pid
        ) in decoders:  # the kernel hangs up on a group that is stopped and has lost its parent
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert code == 1
        assert b" 503 " in read_answer(waiting)
        assert "stuck" in server.log.read_text()


def test_client_that_does_not_read_does_not_hold_the_exit_up(fake: Start, figure: Figure) -> None:
    """Answers that nobody reads end with the grace time, not with the time to read them."""
    with fake(drain_delay_s=0.2, grace_s=0.5) as server, dial(server.url, 4096) as deaf:
        deaf.sendall(get("/static/redoc.standalone.js") * 8)
        time.sleep(0.5)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(20)
        took_s = time.monotonic() - start
        figure(f"gone after {took_s:.2f} s of 0.7")
        assert took_s < 2
        assert code == 0


def test_interrupt(fake: Start) -> None:
    """SIGINT comes from a person at a terminal, who is not kept waiting for any balancer."""
    with fake(drain_delay_s=30) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0


def test_second_sigterm(fake: Start, figure: Figure) -> None:
    """A second SIGTERM ends the process at once."""
    with fake(drain_delay_s=30) as server:
        server.process.send_signal(signal.SIGTERM)
        until(lambda: one(server.url, get("/readyz")).status == 503)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 128 + signal.SIGTERM
        figure(f"after {(time.monotonic() - start) * 1000:.0f} ms")


def test_refusals_close_while_draining(fake: Start) -> None:
    """While draining, every answer carries `Connection: close`, refusals and errors included."""
    with fake(drain_delay_s=30, max_requests=1) as server, dial(server.url) as holder:
        kept = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
        kept.sendall(get("/livez"))
        assert b"connection: close" not in read_answer(kept).lower()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: one(server.url, get("/readyz")).status == 503)
        kept.sendall(post(make_image()))  # idle since before the signal
        answer = read_answer(kept).lower()
        kept.close()
        assert answer.startswith(b"http/1.1 200")
        assert b"connection: close" in answer
        for request in (get("/livez"), get("/nowhere"), post(b"x"), b"what?\r\n\r\n"):
            answers = one(server.url, request)
            assert answers.header("Connection") == "close", request
        holder.sendall(post(b"").replace(b"Length: 0", b"Length: 9"))
        until(lambda: one(server.url, post(b"")).status == 429)
        refused = one(server.url, post(b""))
        assert refused.status == 429
        assert refused.header("Connection") == "close"


def test_request_behind_the_last(fake: Start) -> None:
    """What a client has sent behind a request whose answer closes the connection is not begun."""
    with fake(drain_delay_s=30) as server, dial(server.url) as client:
        server.process.send_signal(signal.SIGTERM)
        until(lambda: one(server.url, get("/readyz")).status == 503)
        last = post(b"x", Content_Type="text/plain", X_Request_ID="last")
        client.sendall(last + post(make_image(), X_Request_ID="behind"))
        assert read_answer(client).startswith(b"HTTP/1.1 415")
        assert one(server.url, get("/livez")).status == 200
        log = server.log.read_text()
        assert '"last"' in log
        assert '"behind"' not in log


@pytest.mark.parametrize(("has_begun", "statuses"), [(True, [200]), (False, [503])])
def test_cancelled_by_the_grace_time(has_begun: bool, statuses: list[int]) -> None:
    """A request that is cancelled gets a 503, but no second answer if it has begun to get one."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def cancelled(_: Scope, _receive: Receive, send: Send) -> None:
        if has_begun:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise asyncio.CancelledError

    draining = SimpleNamespace(state=SimpleNamespace(service=SimpleNamespace(draining=True)))
    scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "app": draining}
    asyncio.run(Access(cancelled, Metrics(), [])(scope, receive, send))
    assert [m["status"] for m in sent if m["type"] == "http.response.start"] == statuses
