"""The command `mixer-serve`: settings, model, socket, server, in this order."""

import logging
import socket
import sys
from collections.abc import Sequence

import uvicorn

from app.engine import OnnxEngine
from app.errors import StartupError
from app.main import create_app
from app.settings import Settings, read_settings

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop; return the exit code."""
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments)
        logging.basicConfig(
            level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s"
        )
        engine = OnnxEngine(settings.model, settings.device, settings.threads)
        listener = _bind(settings)
    except StartupError as error:
        sys.stderr.write(f"mixer-serve: {error}\n")
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
    config = uvicorn.Config(
        create_app(settings, engine),
        http="httptools",
        ws="none",
        log_config=None,
        log_level=settings.log_level,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,  # outlives a balancer's idle pool (nginx: 60 s)
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def _bind(settings: Settings) -> socket.socket:
    """Bind before the model is served, so that a taken port is one plain line."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise StartupError(
            f"MIXER_HOST={settings.host} MIXER_PORT={settings.port}: "
            f"cannot listen there ({error.strerror})"
        ) from error
    return listener


if __name__ == "__main__":
    sys.exit(main())
