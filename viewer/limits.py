"""What the server of the page does not even read."""

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

LARGEST = 15 * 2**20  # bytes of a request: a picture of 10 MB in base64, and a little


class Guard:
    """ASGI middleware that refuses large requests, and files for Gradio's cache, which this page does not use."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        refusal = None
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit():
                refusal = PlainTextResponse("Please say how long the request is.", 411)
            elif int(length) > LARGEST:
                refusal = PlainTextResponse("This request is too large.", 413)
            elif scope["path"].rstrip("/").endswith("/upload"):
                refusal = PlainTextResponse("This page takes no files but pictures to look at.", 403)
        await (refusal or self.app)(scope, receive, send)
