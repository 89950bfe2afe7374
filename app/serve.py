"""The command `mixer-serve`: settings, socket, model, server, in this order."""

import ctypes
import errno
import logging
import socket
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from app import tune
from app.cpus import INFERENCE_NICE, give_way
from app.cuda import GpuOptions
from app.decoders import check_decoders, task_of
from app.draining import DrainingServer
from app.engine import OnnxEngine
from app.errors import StartupError
from app.keys import ApiKeys
from app.logs import configure
from app.main import create_app
from app.nursery import nursery
from app.runtime import MORE_MEMORY
from app.settings import Settings, read_settings
from app.start import end_when_told, open_standard_streams

logger = logging.getLogger(__name__)

BACKLOG = 2048  # connections that wait to be accepted, as uvicorn's own
# libuv accepts one connection from a listener in each round of the event loop, and under a thousand
# busy connections a round is long: a probe that dials anew would wait for seconds. So there are
# some descriptors of the one listener.
ACCEPTS_PER_ROUND = 32
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_BLOCK_BYTES = 4 * 2**20  # no batch: what it is stacked in would come anew each time
# Besides connections: the listeners, the event loop's own, the model, the log, closing connections.
SPARE_DESCRIPTORS = 192
# Besides those that settings choose: the nursery, the log, documents, long answers, spans, whoever
# opens the model, libuv's, and the one that waits for the others at the end.
SPARE_THREADS = 12
_FIXES = {
    errno.EADDRINUSE: "end whoever listens there, or choose another port",
    errno.EACCES: "choose a port from 1024 up, which need no privilege",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop, or `tune`; return the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] == "tune":
        return tune.main(words[1:])
    open_standard_streams()
    _map_large_blocks()
    try:
        settings = read_settings(words)
        configure(settings.log_level, settings.log_format)
        # A thread that parses in Python gives way to the event loop after 1 ms instead of 5.
        sys.setswitchinterval(0.001)
        # They tell at debug of what is in a form or a picture: names, places, whatever EXIF holds.
        for name in ("python_multipart", "PIL"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if settings.api_keys_file is not None:
            ApiKeys(settings.api_keys_file)  # refused now, if at all, and not after the model
        end_when_told()
        listener = _bind(settings)
        _check_threads(settings)
        _start_nursery()
        settings = _allow_descriptors(settings)
        engine = _open(settings)
        task = task_of(engine.card.preprocessing, settings)
        check_decoders(settings.decode_threads, task)
        app = create_app(settings, engine)
        _listen(listener, settings)
    except StartupError as error:
        sys.stderr.write(f"mixer-serve: {' '.join(str(error).splitlines())}\n")
        return 1
    except MemoryError:
        sys.stderr.write(f"mixer-serve: there is too little memory to start; {MORE_MEMORY}\n")
        return 1
    host, port = listener.getsockname()[:2]
    logger.info(
        "serving %s (%d px, %d classes) on %s at http://%s:%d",
        engine.card.name,
        engine.card.preprocessing.image_size,
        len(engine.card.labels),
        engine.provider,
        f"[{host}]" if ":" in host else host,
        port,
    )
    others = [listener.dup() for _ in range(ACCEPTS_PER_ROUND - 1)]
    DrainingServer(app, settings).run(sockets=[listener, *others])
    return 0


def _map_large_blocks() -> None:
    """Have the C library map what is as large as a body, so that it goes back as a whole.

    By itself it begins, after the first such block, to carve all others from its heaps, where
    whatever lies behind them keeps them (mallopt(3), M_MMAP_THRESHOLD).
    """
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):  # glibc's
        allocator.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
        allocator.mallopt(M_TRIM_THRESHOLD, 8 * 2**20)


def _check_threads(settings: Settings) -> None:
    """Start as many threads as there will be at most, decoders counted as such, and end them.

    ONNX Runtime would wait for ever for those that it cannot start.

    Raises:
        StartupError: fewer are allowed.
    """
    # Those that infer are its own, those of shares and those of batches.
    count = 3 * settings.threads + 2 * settings.decode_threads + SPARE_THREADS
    end = threading.Event()
    started: list[threading.Thread] = []
    usual_bytes = threading.stack_size(2**18)  # a limit of memory is not what is tried here
    try:
        for _ in range(count):
            thread = threading.Thread(target=end.wait, daemon=True)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise StartupError(
            f"MIXER_THREADS={settings.threads} MIXER_DECODE_THREADS={settings.decode_threads}: "
            f"they need {count} threads and processes, and the container or shell allows "
            f"{len(started)} more (pids limit, ulimit -u; for memory -v and -d): choose fewer, or "
            "allow more"
        ) from error
    finally:
        threading.stack_size(usual_bytes)
        end.set()
        for thread in started:
            thread.join()


def _start_nursery() -> None:
    """Let it load what decoders need while the model is loaded here."""
    try:
        nursery()
    except OSError as error:
        raise StartupError(
            f"images cannot be decoded here: no process can be started ({error.strerror})"
        ) from error


def _open(settings: Settings) -> OnnxEngine:
    """Open the model in a thread that gives way: those which ONNX Runtime starts there do, too."""
    with ThreadPoolExecutor(1, initializer=give_way, initargs=(INFERENCE_NICE,)) as opener:
        return opener.submit(
            OnnxEngine,
            settings.model,
            settings.device,
            settings.threads,
            max_batch=settings.max_batch,
            gpu=GpuOptions(settings.gpu_memory_mib, settings.tensorrt_cache),
        ).result()


def _bind(settings: Settings) -> socket.socket:
    """Bind before the model is loaded, so that a taken port is one plain line at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        raise _cannot_listen(settings, error) from error
    return listener


def _listen(listener: socket.socket, settings: Settings) -> None:
    """Take connections from now on, unless another process that bound the port, too, was first."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise _cannot_listen(settings, error) from error


def _cannot_listen(settings: Settings, error: OSError | UnicodeError) -> StartupError:
    # A name with an impossible label is a UnicodeError.
    reason = error.strerror if isinstance(error, OSError) else "no name of a host"
    fix = "give a bare name or address of this host; the port is MIXER_PORT's"
    if isinstance(error, OSError) and not isinstance(error, socket.gaierror):
        fix = _FIXES.get(error.errno or 0, fix)
    return StartupError(
        f"MIXER_HOST={settings.host} MIXER_PORT={settings.port}: cannot listen there ({reason}); "
        f"{fix}"
    )


def _allow_descriptors(settings: Settings) -> Settings:
    """Raise the process's own limit of open descriptors to what the connections may need.

    Where it cannot be raised so far, there are fewer connections: the settings say how many.

    Raises:
        StartupError: the limit leaves none.
    """
    import resource

    spare = SPARE_DESCRIPTORS + settings.decode_threads
    wanted = settings.max_connections + spare
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if most <= spare:
        raise StartupError(
            f"the container or shell allows {hard} descriptors (ulimit -n): more than {spare} "
            "are needed"
        )
    if most < wanted:
        logger.warning(
            "MIXER_MAX_CONNECTIONS=%d: at most %d can be open here, since the container or shell "
            "allows %d descriptors (ulimit -n)",
            settings.max_connections,
            hard - spare,
            hard,
        )
        settings = settings.model_copy(update={"max_connections": most - spare})
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return settings


if __name__ == "__main__":
    sys.exit(main())
