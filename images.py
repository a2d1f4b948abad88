"""Images as files and as model input: one decoder, one crop, one normalization for training, tools, and the viewer."""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, per channel, for pixels in 0..1


def load_image(file: str | Path | BinaryIO, min_size: int | None = None) -> Image.Image:
    """Decode an image file to 8-bit RGB: EXIF orientation applied, transparency on white, 16 bits reduced to 8.

    With `min_size`, a JPEG may be decoded at reduced scale, which is faster, but no side gets shorter than that.
    Raises ValueError if the file is not a readable image.
    """
    try:
        with Image.open(file) as image:
            if min_size:
                image.draft(None, (min_size, min_size))
            return to_rgb(image)
    except FileNotFoundError as error:
        raise ValueError(f"{file} does not exist") from error
    except Exception as error:  # decoders raise nearly any exception on a damaged file
        raise ValueError(f"{file} is not a readable image") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image to 8-bit RGB, as `load_image` does."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    background = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(background, image).convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels as uint8, 3 H W."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def preprocess(model, image) -> Tensor:
    """An image as input of a model from `weights.open_model`: cropped as in its evaluation, and normalized (1 3 H W).

    `image` is a path, the bytes of a file, a PIL image, or an array (H W 3, uint8). Raises ValueError if it is
    unreadable.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    elif isinstance(image, bytes):
        image = io.BytesIO(image)
    image = to_rgb(image) if isinstance(image, Image.Image) else load_image(image)
    return normalize(to_tensor(center_crop(image, *model.config.image_shape, model.crop_pct))[None])


def center_crop(image: Image.Image, height: int, width: int, crop_pct: float = 1.0) -> Image.Image:
    """A centered crop with the aspect ratio height : width, resized to that size.

    It has the fraction `crop_pct` of the largest such crop's sides.
    """
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC, bleed=(1 - crop_pct) / 2)


def default_crop_pct(height: int, width: int) -> float:
    """The fraction of an image's sides to evaluate on: all of it up to 64 pixels, else 7/8, as usual for ImageNet."""
    return 1.0 if max(height, width) <= 64 else 0.875


def normalize(images: Tensor) -> Tensor:
    """Normalize pixels in 0..255 (b 3 H W, any dtype) by ImageNet's mean and standard deviation, as models expect."""
    # Python floats, channel by channel: tensors of constants would have to be copied to the GPU
    channels = zip(images.unbind(dim=-3), MEAN, STD, strict=True)
    return torch.stack([(channel / 255 - mean) / std for channel, mean, std in channels], dim=-3)
