"""Rejects requests to the viewer before their body is read."""

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

MAX_REQUEST_BYTES = 15 * 2**20  # an image of 10 MB in base64, with some margin


class RequestLimitMiddleware:
    """ASGI middleware that rejects large requests and uploads to Gradio's file cache, which the viewer does not use."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        rejection = None
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit():
                rejection = PlainTextResponse("Content-Length required.", 411)
            elif int(length) > MAX_REQUEST_BYTES:
                rejection = PlainTextResponse("Request too large.", 413)
            elif scope["path"].rstrip("/").endswith("/upload"):
                rejection = PlainTextResponse("File uploads are disabled.", 403)
        await (rejection or self.app)(scope, receive, send)
