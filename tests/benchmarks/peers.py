"""The servers of the benchmark: what to install, how to start them, how to ask them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version

# The same releases as here, so that servers differ in nothing but themselves.
_WORK = tuple(f"{name}=={version(name)}" for name in ("onnxruntime", "pillow", "pydantic"))
_BOUNDARY = "mixer-serve-benchmark"


@dataclass(frozen=True)
class Server:
    """One contender."""

    name: str
    packages: tuple[str, ...]  # for pip, into an environment of its own
    command: str  # run in the repository, with {bin}, {port}, {model}, … filled in
    path: str
    content_type: str
    body: Callable[[bytes], bytes] = bytes  # from a JPEG to what the server wants
    more_headers: str = ""
    metrics_path: str = ""  # where it tells of its batches, in Prometheus' words

    def head(self, port: int) -> str:
        """Return a request's line and headers; the body's {length} is filled in by the load."""
        return (
            f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Content-Type: {self.content_type}\r\n{self.more_headers}"
            "Content-Length: {length}\r\n\r\n"
        )


def _form(field: str) -> Callable[[bytes], bytes]:
    def encode(photo: bytes) -> bytes:
        head = (
            f"--{_BOUNDARY}\r\nContent-Disposition: form-data; "
            f'name="{field}"; filename="photo.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
        )
        return head.encode() + photo + f"\r\n--{_BOUNDARY}--\r\n".encode()

    return encode


_FORM = f"multipart/form-data; boundary={_BOUNDARY}"


# Triton's binary extension of the Open Inference Protocol: a JSON head of fixed length, then the
# tensor. Padding keeps its length the same for every photo.
_TRITON_HEAD_BYTES = 256


def _triton(photo: bytes) -> bytes:
    tensor = len(photo).to_bytes(4, "little") + photo
    head = {
        "inputs": [
            {
                "name": "image",
                "shape": [1, 1],
                "datatype": "BYTES",
                "parameters": {"binary_data_size": len(tensor)},
            }
        ]
    }
    return json.dumps(head).ljust(_TRITON_HEAD_BYTES).encode() + tensor


_MODULE = "{bin}/python -m tests.benchmarks.servers"
_SERVE_FLAGS = "--port {port} --model {model} --device cpu --log-level error"

OURS = Server(
    "mixer-serve",
    ("--editable", ".[cpu]", *_WORK),
    "{bin}/python -m app.serve --max-batch {batch} --threads {threads} "
    "--request-timeout-ms 30000 " + _SERVE_FLAGS,  # as long as the peers' own
    "/classify",
    "image/jpeg",
    metrics_path="/metrics",
)
# The same environment; its engine is a stand-in.
FRONT_END = replace(OURS, command=f"{_MODULE}.fixed_latency {_SERVE_FLAGS}")
PEERS = (
    Server(
        "mosec",
        ("mosec==0.9.8", *_WORK),
        _MODULE + ".mosec_stages --port {port} --address 127.0.0.1 --timeout 30000",
        "/inference",
        "image/jpeg",
    ),
    Server(
        "FastAPI",
        ("fastapi==0.165.0", "uvicorn[standard]==0.54.0", "python-multipart==0.0.34", *_WORK),
        f"{_MODULE}.fastapi_upload",
        "/classify",
        _FORM,
        _form("file"),
    ),
    Server(
        "LitServe",
        ("litserve==0.2.19", "python-multipart==0.0.34", *_WORK),
        f"{_MODULE}.litserve_api",
        "/predict",
        _FORM,
        _form("file"),
    ),
    Server(
        "pytriton",
        ("nvidia-pytriton==0.7.0", *_WORK),
        f"{_MODULE}.pytriton_bind",
        "/v2/models/classify/infer",
        "application/octet-stream",
        _triton,
        f"Inference-Header-Content-Length: {_TRITON_HEAD_BYTES}\r\n",
    ),
    Server(
        "BentoML",
        ("bentoml==1.4.39", *_WORK),
        "{bin}/bentoml serve tests.benchmarks.servers.bentoml_service:Classify "
        "--port {port} --host 127.0.0.1",
        "/classify",
        _FORM,
        _form("images"),
    ),
)
SERVERS = {server.name: server for server in (OURS, *PEERS)}
