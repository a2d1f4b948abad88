"""Pictures as files: opened alike for training and for the page (but for JPEGs in train_imagenet.py, for speed)."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps


def open_picture(file: Path | BinaryIO, enough: int | None = None) -> Image.Image:
    """Any common picture as RGB: upright, transparency on white, 16 bits as 8. Raises ValueError where it is none.

    A JPEG with more than `enough` pixels a side may come smaller, but not below that: it is decoded faster.
    """
    try:
        with Image.open(file) as picture:
            if enough:
                picture.draft(None, (enough, enough))
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):
                picture = Image.fromarray((np.asarray(picture) // 256).clip(0, 255).astype(np.uint8))
            if not picture.has_transparency_data:
                return picture.convert("RGB")
            picture = picture.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    except Exception as error:  # a decoder raises nearly anything on a damaged picture
        raise ValueError(f"{file} cannot be read as a picture; mend or remove it") from error


def middle(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The largest part from the middle that has the shape height x width, scaled to it."""
    return ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
