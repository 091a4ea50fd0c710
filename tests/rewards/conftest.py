"""A scripted HTTP server on 127.0.0.1."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Endpoint:
    """Answers the n-th request by the n-th function of `script`, the last one for ever; keeps what it was asked."""

    def __init__(self) -> None:
        self.script: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.bodies: list[object] = []
        self.headers: list[dict[str, str]] = []
        self.release = threading.Event()
        self.url = ""

    def answer(self, status: int, body: bytes | str, **headers: str) -> None:
        """Add an answer to the script."""
        content = body if isinstance(body, bytes) else body.encode()

        def send(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)

        self.script.append(send)

    def rewards(self, *values: object) -> None:
        """Add a good answer to the script."""
        self.answer(200, json.dumps({"rewards": values}))


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            state.bodies.append(json.loads(content))
            state.headers.append(dict(self.headers))
            try:
                state.script[min(len(state.bodies), len(state.script)) - 1](self)
            except OSError:
                # The client has gone.
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            return

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "QUARTET_REWARD_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/score"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    state.release.set()
    server.shutdown()
    server.server_close()
    thread.join()
