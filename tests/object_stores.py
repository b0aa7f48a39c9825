"""A real S3 server on loopback (moto's), and one that is slow and fails in between."""

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "bucket"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
Application = Callable[[dict[str, Any], Callable[..., Any]], Any]


class Faulty:
    """Answers a share of the requests with 503, drops some after the work was done, and keeps others waiting."""

    def __init__(self, application: Application, share: float, seconds: float, seed: int = 0):
        self._application, self.share, self._seconds = application, share, seconds
        self._random, self._lock = random.Random(seed), threading.Lock()  # noqa: S311
        self.refused = self.dropped = self.slow = self.served = 0
        self.kill: tuple[int, int] | None = None
        """After so many more requests this process is killed before it hears of the last one."""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        with self._lock:
            self.served += 1
            if self.kill is not None and self.served >= self.kill[0]:
                answer = list(self._application(environ, lambda *_: lambda _: None))
                os.kill(self.kill[1], signal.SIGKILL)
                self.kill = None
                return answer
            drawn = self._random.random() / self.share if self.share else 1.0
        if drawn < 1 / 3:
            self.refused += 1
            length = int(environ.get("CONTENT_LENGTH") or 0)
            environ["wsgi.input"].read(length)
            start_response("503 Slow Down", [("Content-Type", "text/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        if drawn < 2 / 3:
            self.dropped += 1  # the store has done it, and the client does not hear of it
            list(self._application(environ, lambda *_: lambda _: None))
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        if drawn < 1:
            self.slow += 1
            time.sleep(self._seconds)
        return self._application(environ, start_response)


@contextmanager
def s3_server(share: float = 0.0, seconds: float = 0.0) -> Iterator[tuple[dict[str, str], Faulty]]:
    """The environment that leads to an S3 server with one empty bucket, and the server's faults."""
    faulty = Faulty(DomainDispatcherApplication(create_backend_app), share, seconds)
    server = make_server("127.0.0.1", 0, faulty, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
    try:
        yield environment, faulty
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def new_store() -> Any:
    """The file system that the environment leads to, without what an earlier one remembers."""
    fsspec.filesystem("s3").clear_instance_cache()
    return fsspec.filesystem("s3", use_listings_cache=False)
