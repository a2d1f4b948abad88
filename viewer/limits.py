"""Limits on uploads and requests, and the encodings in which images travel to the browser."""

import base64
import io
from threading import BoundedSemaphore

from PIL import Image
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from images import load_image, open_image

MAX_UPLOAD_MB = 20
MAX_REQUEST_BYTES = 30 * 2**20  # an upload in base64, with some margin
MAX_MEGAPIXELS, MAX_JPEG_MEGAPIXELS = 20, 50  # a large JPEG is decoded at a reduced scale
decoding = BoundedSemaphore(2)  # images at once: one of 20 megapixels takes 0.5 GB
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # MPO: JPEGs of some phones


def load_upload(data: bytes, min_size: int) -> Image.Image:
    """Decode an uploaded image, as `load_image` does. Raises ValueError with a message for the user."""
    if len(data) > MAX_UPLOAD_MB * 2**20:
        raise ValueError(f"This file is larger than {MAX_UPLOAD_MB} MB; please choose a smaller image.")
    try:
        with open_image(data) as image:
            file_format, megapixels = image.format, image.width * image.height / 1e6
        if file_format not in FORMATS:
            raise ValueError("the file has an unsupported format: convert it to JPEG or PNG")
        limit = MAX_JPEG_MEGAPIXELS if file_format in ("JPEG", "MPO") else MAX_MEGAPIXELS
        if megapixels > limit:
            raise ValueError(f"the file has more than {limit} megapixels, the limit for {file_format}")
        with decoding:
            return load_image(data, min_size)
    except ValueError as error:
        raise ValueError(f"{str(error).replace('the file', 'This file', 1)}; please choose another image.") from None


def encode_image(image: Image.Image, file_format: str, **options) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def data_url(data: bytes, file_format: str) -> str:
    """An image file as a data URL, for the src of an <img>."""
    return f"data:image/{file_format.lower()};base64,{encode_base64(data)}"


def encode_base64(data: bytes) -> str:
    """The text in which bytes travel to the browser."""
    return base64.b64encode(data).decode()


def limit_requests(app: ASGIApp) -> ASGIApp:
    """ASGI middleware that rejects large requests, and those whose content Gradio would write to disk."""

    async def limited(scope: Scope, receive: Receive, send: Send):
        rejection = None
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/deep_link"):
            rejection = PlainTextResponse("Deep links are disabled.", 403)
        elif scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            types = [value.lower() for name, value in scope["headers"] if name == b"content-type"]
            if not length.isdigit():
                rejection = PlainTextResponse("Content-Length required.", 411)
            elif int(length) > MAX_REQUEST_BYTES:
                rejection = PlainTextResponse("Request too large.", 413)
            elif any(value.startswith(b"multipart/") for value in types):
                rejection = PlainTextResponse("File uploads are disabled.", 403)
        await (rejection or app)(scope, receive, send)

    return limited
