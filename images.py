"""Images as files and as model input: one decoder, one crop, one normalization for training, tools, and the viewer."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, per channel, for pixels in 0..1
# formats that Pillow registers but cannot read by itself: they need another program or a plugin, or are write-only
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"}
EXTENSIONS = {extension for extension, name in Image.registered_extensions().items() if name not in NOT_DECODED}
FORMATS = [name for name in Image.ID if name not in NOT_DECODED]
MIN_SIZE = 720  # minimum shorter side of a decoded JPEG, in pixels: a photo of 4000 x 3000 is decoded at 1/4


@contextlib.contextmanager
def open_image(file: str | Path | bytes) -> Iterator[Image.Image]:
    """Open an image file, or the bytes of one. Raises ValueError, saying why, if it cannot be opened or decoded."""
    name = "the file" if isinstance(file, bytes) else file
    try:
        data = file if isinstance(file, bytes) else Path(file).read_bytes()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} {_unidentified(data)}") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        limit = f"{2 * Image.MAX_IMAGE_PIXELS:,} pixels"
        raise ValueError(f"{name} is too large to decode (the limit is {limit})") from error
    except Exception as error:  # decoders raise nearly any exception on a damaged file
        if isinstance(error, OSError) and error.errno:  # from the file system, not from a decoder
            raise ValueError(f"{name} cannot be opened: {error.strerror}") from error
        raise ValueError(f"{name} is truncated or damaged ({error})") from error


def _unidentified(data: bytes) -> str:
    """Why Pillow cannot identify a file, judging by its first bytes."""
    if not data:
        return "is empty"
    prefix = data[:16].ljust(16, b"\0")
    found = {name: result for name, (_, accept) in Image.OPEN.items() if accept and (result := accept(prefix))}
    is_missing = found.keys() & NOT_DECODED or str in map(type, found.values())  # a str: Pillow lacks the decoder
    is_heic = prefix[4:8] == b"ftyp" and not (found and b"avi" in data[8:64])  # Pillow takes some brands for AVIF
    is_jpeg_xl = prefix.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL "))
    if is_missing or is_heic or (not found and (is_jpeg_xl or b"<svg" in data[:256])):
        return "has an unsupported format: convert it to JPEG or PNG"
    return "has a damaged header or an unsupported variant of its format" if found else "is not an image"


def load_image(file: str | Path | bytes, min_size: int = MIN_SIZE) -> Image.Image:
    """Decode an image file to 8-bit RGB; see `to_rgb`.

    A large JPEG is decoded at the smallest of its built-in scales (1/2, 1/4, 1/8) that leaves `min_size` pixels on
    each side, which is faster. Raises ValueError like `open_image`.
    """
    with open_image(file) as image:
        image.draft(None, (min_size, min_size))
        return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image to 8-bit RGB: EXIF orientation applied, transparency on white.

    Integers of more than 8 bits are assumed to be in 0..65535. Floats are assumed to be in 0..1 if all are below 2, in
    0..255 if none exceeds 255, and otherwise in 0..65535. Values out of range are clipped; NaN is black.
    """
    with contextlib.suppress(SyntaxError):  # of Pillow, if the EXIF data are damaged
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16- or 32-bit integers, or floats
        pixels = np.asarray(image)
        if "transparency" in image.info:  # the value of transparent pixels
            pixels = np.where(pixels == image.info["transparency"], 65535, pixels)
        peak = pixels.max(where=np.isfinite(pixels), initial=0)
        scale = 1 / 256 if image.mode[0] == "I" or peak > 255 else 1 if peak >= 2 else 255
        image = Image.fromarray(np.nan_to_num((pixels * scale).clip(0, 255)).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    background = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")


def load_crop(image, height: int, width: int, crop_pct: float) -> Tensor:
    """The center crop of an image for evaluation (uint8, 3 H W).

    `image` is a path, the bytes of a file, a PIL image, or a uint8 array (H W, or H W 3). Raises ValueError for
    anything else, and like `open_image`.
    """
    if isinstance(image, str | Path | bytes):
        image = load_image(image, decode_size(height, width))
    elif isinstance(image, Image.Image):
        try:
            image = to_rgb(image)
        except Exception as error:  # Pillow decodes an opened file only now, and raises nearly any exception
            raise ValueError(f"the image is truncated or damaged, or its file was closed ({error})") from error
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim > 1 and image.shape[2:] in ((), (3,)):
        image = Image.fromarray(image).convert("RGB")
    else:
        raise ValueError("an image must be a path, the bytes of a file, a PIL image, or a uint8 array (H W, or H W 3)")
    if 0 in image.size:
        raise ValueError("the image has no pixels")
    return to_tensor(center_crop(image, height, width, crop_pct))


def decode_size(height: int, width: int) -> int:
    """The `min_size` of `load_image` for an image that will be resized to height x width."""
    return max(MIN_SIZE, 2 * max(height, width))


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels as uint8, 3 H W."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def preprocess(model, image) -> Tensor:
    """An image as input of a model from `weights.open_model`: cropped as in its evaluation, and normalized (1 3 H W).

    The input has the device and dtype of the model. `image` is anything that `load_crop` takes. Raises ValueError if it
    is unreadable.
    """
    return normalize(load_crop(image, *model.config.image_shape, model.crop_pct)[None]).to(model.pos_embed)


def center_crop(image: Image.Image, height: int, width: int, crop_pct: float = 1.0) -> Image.Image:
    """A centered crop, resized to height x width: the fraction `crop_pct` of the sides of the largest such crop."""
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC, bleed=(1 - crop_pct) / 2)


def default_crop_pct(height: int, width: int) -> float:
    """The fraction of an image's sides to evaluate on: all of it up to 64 pixels, else 7/8, as usual for ImageNet."""
    return 1.0 if max(height, width) <= 64 else 0.875


def normalize(images: Tensor) -> Tensor:
    """Normalize pixels in 0..255 (b c H W, any dtype) by ImageNet's mean and standard deviation, as models expect.

    A single channel, grayscale, is normalized by their averages over RGB. Raises ValueError if c is neither 1 nor 3.
    """
    if images.shape[-3] not in (1, 3):
        raise ValueError(f"images of {images.shape[-3]} channels have no mean and standard deviation: expected 1 or 3")
    mean, std = (MEAN, STD) if images.shape[-3] == 3 else ([sum(MEAN) / 3], [sum(STD) / 3])
    # Python floats, channel by channel: tensors of constants would have to be copied to the GPU
    channels = zip(images.unbind(dim=-3), mean, std, strict=True)
    return torch.stack([(channel / 255 - mean) / std for channel, mean, std in channels], dim=-3)
