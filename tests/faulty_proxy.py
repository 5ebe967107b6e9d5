"""A proxy before Label Studio that does on request what networks do by chance."""

import http.client
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Exchange:
    """A request on its way to Label Studio."""

    target: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def forward(self) -> "Answer":
        """Let Label Studio carry it out."""
        connection = http.client.HTTPConnection(urlsplit(self.target).netloc, timeout=60)
        try:
            connection.request(self.method, self.path, self.body, self.headers)
            answer = connection.getresponse()
            return Answer(answer.status, answer.read(), dict(answer.getheaders()))
        finally:
            connection.close()


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


# What happens to a request: its answer, or None for a connection that breaks.
Fate = Callable[[Exchange], Answer | None]


@dataclass
class FaultyProxy:
    """Forwards everything, except that each import meets the next of the fates, as long as there are any.

    Attributes:
        target: address of Label Studio.
        fates: what the next imports meet.
        requests: method and path of everything that came.
        tamper: changes any request's headers on their way.
    """

    target: str
    fates: list[Fate] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    tamper: Callable[[Exchange], None] | None = None
    address: str = ""

    def imports(self) -> int:
        """How many imports came."""
        return sum(path.split("?")[0].endswith("/import") for _method, path in self.requests)

    def meet(self, exchange: Exchange) -> Answer | None:
        self.requests.append((exchange.method, exchange.path))
        if self.tamper is not None:
            self.tamper(exchange)
        if exchange.path.split("?")[0].endswith("/import") and self.fates:
            return self.fates.pop(0)(exchange)
        return exchange.forward()


@contextmanager
def faulty_proxy(target: str) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            answer = proxy.meet(Exchange(proxy.target, self.command, self.path, headers, body))
            self.close_connection = True
            if answer is None:
                return
            try:
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "text/html"))
                if "Location" in answer.headers:
                    self.send_header("Location", answer.headers["Location"])
                self.send_header("Content-Length", str(len(answer.body)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(answer.body)
            except OSError:
                pass  # whoever asked has gone

        def __getattr__(self, name: str) -> Callable[[], None]:
            if name.startswith("do_"):
                return self.handle_any
            raise AttributeError(name)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def never_carried_out(_exchange: Exchange) -> Answer | None:
    """The connection breaks before Label Studio has the request."""
    return None


def answer_lost(exchange: Exchange) -> Answer | None:
    """Label Studio carries it out; the connection breaks before the answer."""
    exchange.forward()
    return None


def gateway_timeout(exchange: Exchange) -> Answer | None:
    """Label Studio carries it out; a proxy in between says that it did not."""
    exchange.forward()
    return Answer(504, b"<html>Gateway Time-out</html>")


@dataclass
class Held:
    """Holds a request back, or the answer to it, until it is let go.

    Attributes:
        carried_out_first: whether Label Studio gets the request before it waits.
        arrived: the request is here (and has been carried out).
        released: let it go.
        done: Label Studio has carried it out and the answer went out.
    """

    carried_out_first: bool
    arrived: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, exchange: Exchange) -> Answer | None:
        answer = exchange.forward() if self.carried_out_first else None
        self.arrived.set()
        self.released.wait(120)
        answer = answer or exchange.forward()
        self.done.set()
        return answer
