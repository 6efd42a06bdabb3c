"""The sockets of the loopback Hub: two HTTP servers on 127.0.0.1, one request at a time per connection."""

from __future__ import annotations

import json
import re
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .faults import KINDS, Fault
from .routes import ROUTES
from .store import HubError, Repo


class Request(BaseHTTPRequestHandler):
    """One HTTP request; the routes are given it and call `reply` or `send_file` once."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: LoopbackHub
    body: bytes
    query: dict[str, list[str]]
    user: str | None

    @property
    def method(self) -> str:
        return self.command

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def log_message(self, format: str, *args: Any) -> None:
        """Keep silent: tests read `hub.requests`."""

    def fault(self, kind: str) -> dict[str, Any] | None:
        """The detail of an armed fault of this kind that matches this request, counting it down."""
        return self.hub.take(kind, f"{self.command} {unquote(self.path)}")

    def reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_file(self, data: bytes, headers: dict[str, str]) -> None:
        """Send a file, from `Range: bytes=N-` on, with whatever fault is armed for it."""
        if (fault := self.fault("etag")) is not None:
            headers = headers | {"ETag": fault["value"]}
        if self.command == "GET" and self.fault("corrupt") is not None:
            data = data[:-1] + bytes([data[-1] ^ 1])
        status = 200
        if found := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
            status, headers = 206, headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            data = data[start:]
        cut = self.fault("cut") if self.command == "GET" else None
        flood = self.fault("flood") if self.command == "GET" else None
        slow = self.fault("slow")
        length = len(data) + (flood["extra"] if flood else 0)
        self.send_response(status)
        self.send_header("Content-Length", str(flood.get("announce", length) if flood else length))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut is not None:
            data = data[: cut["after"]]
        for at in range(0, len(data), 4096 if slow else max(1, len(data))):
            if slow:
                time.sleep(slow["seconds"])
            self.wfile.write(data[at : at + 4096] if slow else data)
        for _ in range(0, flood["extra"] if flood else 0, 1 << 16):
            self.wfile.write(b"\0" * (1 << 16))
            self.hub.flooded += 1 << 16
        if cut is not None or flood is not None:
            self.close_connection = True

    def serve(self) -> None:
        """Find the route and call it; answer errors as the Hub does, and keep bugs of this server for `hub.bugs`."""
        parts = urlsplit(self.path)
        expected = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(expected)
        if len(self.body) < expected:  # the client was killed in the middle of its request
            self.close_connection = True
            return
        self.query = parse_qs(parts.query)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.user = self.hub.tokens.get(token) if token else None
        self.hub.requests.append((self.command, unquote(self.path), token))
        moved = re.match(r"(/api/models)?/([\w.-]+)(?=/|$)", parts.path)
        if moved and moved[2] in self.hub.moved:
            to = f"{moved[1] or ''}/{self.hub.moved[moved[2]]}{self.path[moved.end():]}"
            self.reply(307, b"", {"Location": to})
            return
        try:
            if (fault := self.fault("status")) is not None:
                raise HubError(fault.get("code", 503), "injected")
            if token and self.user is None:
                raise HubError(401, "Invalid credentials in Authorization header")
            for methods, pattern, function in ROUTES:
                if self.command in methods and (found := pattern.fullmatch(parts.path)):
                    with self.hub.lock if self.command not in ("GET", "HEAD") else threading.Lock():
                        function(self, *(unquote(group or "") for group in found.groups()))
                    return
            raise HubError(404, f"no route for {self.command} {parts.path}")
        except HubError as error:
            code = {"X-Error-Code": error.code} if error.code else {}
            self.reply(error.status, {"error": error.message}, code | {"X-Error-Message": error.message})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        except Exception:  # a bug of this server: 501 is not retried by the client
            self.hub.bugs.append(traceback.format_exc())
            self.reply(501, {"error": "bug of the loopback hub"})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up (killed on purpose) is no error here."""


class LoopbackHub:
    """Both origins and all their state."""

    def __init__(self, tokens: dict[str, str]) -> None:
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}  # as the Hub answers for its first models: gpt2 is openai-community/gpt2 now
        self.large: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.bugs: list[str] = []
        self.faults: list[Fault] = []
        self.flooded = 0
        self.lock = threading.RLock()
        handler = type("BoundRequest", (Request,), {"hub": self})
        self._servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.cdn = (f"http://127.0.0.1:{s.server_address[1]}" for s in self._servers)

    def inject(self, kind: str, match: str = "", times: int = 1_000_000, **detail: Any) -> Fault:
        """Arm a fault (see faults.py) and return it; `.seen` counts how often it acted."""
        assert kind in KINDS, kind
        fault = Fault(kind, match, times, detail)
        self.faults.append(fault)
        return fault

    def take(self, kind: str, what: str) -> dict[str, Any] | None:
        with self.lock:
            for fault in self.faults:
                if fault.kind == kind and fault.match in what and fault.seen < fault.times:
                    fault.seen += 1
                    return fault.detail
        return None

    def reset(self) -> None:
        """Forget repositories, faults and requests."""
        for kept in (self.repos, self.moved, self.large, self.requests, self.bugs, self.faults):
            kept.clear()
        self.flooded = 0

    def __enter__(self) -> LoopbackHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()
