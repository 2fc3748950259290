"""What requests may name and weigh, checked before Gradio sees them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

#: Bytes of a request that is no upload, at most.
BODY = 1 << 18
#: How many bytes larger than its file an upload may be.
FORM = 1 << 16

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Refused(Exception):
    """Raised for a request that is not served; `status` is the HTTP status of the answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Gate:
    """ASGI middleware: no file but those in `folder`, no address to fetch, no endless body.

    Gradio downloads a file that a request names by an address, and passes addresses on; both
    would let a visitor use this machine's network, and evade the limit of an upload.

    Args:
        app: Gradio's ASGI application.
        folder: where uploads and sounds are.
        upload_bytes: bytes of an uploaded file, at most.
    """

    def __init__(self, app: Callable, folder: Path, upload_bytes: int) -> None:
        self.app, self.folder, self.upload_bytes = app, folder.resolve(), upload_bytes

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                receive = await self._check(scope, receive)
            except Refused as error:
                await _answer(send, error)
                return
        await self.app(scope, receive, send)

    async def _check(self, scope: dict[str, Any], receive: Receive) -> Receive:
        """What the application receives the request's body from; raises Refused."""
        path = scope["path"]
        if "/proxy=" in path or "://" in path:
            raise Refused(403, "addresses are not served")
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return receive
        upload = path.endswith("/upload")
        limit = self.upload_bytes + FORM if upload else BODY
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            raise Refused(411, "a body of unknown length; wanted Content-Length")
        if int(length) > limit:
            raise Refused(413, f"{int(length)} bytes; wanted at most {limit}")
        if upload:
            return receive
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self._check_files(body)
        whole = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> dict[str, Any]:
            return next(whole, None) or await receive()

        return again

    def _check_files(self, body: bytes) -> None:
        try:
            paths = list(_paths(json.loads(body)))
        except (ValueError, RecursionError):
            raise Refused(400, "the body is not JSON") from None
        for path in paths:
            try:
                inside = Path(path).resolve().is_relative_to(self.folder)
            except ValueError:  # a null byte
                inside = False
            if not inside:
                raise Refused(403, "a file that was not uploaded")


def _paths(value: Any) -> Iterator[str]:
    """The paths of all files that a request names."""
    if isinstance(value, dict):
        if isinstance(value.get("path"), str):
            yield value["path"]
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _paths(each)


async def _answer(send: Send, error: Refused) -> None:
    body = json.dumps({"detail": str(error)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
