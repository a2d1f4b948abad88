"""The page's example images: from the model's dataset if it can be read, else photos."""

import contextlib
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from einops import rearrange
from gradio.media import get_image
from PIL import Image

from convit_min import Grid
from images import MIN_SIZE, center_crop
from training.data import RunData, cifar_class
from training.distributed import UserError
from training.folders import find_images, find_split
from training.image_folder import StreamedData
from training.patterns import patterns
from viewer.limits import data_url, encode_image, load_upload

PHOTOS = {"cheetah": "cheetah1.jpg", "lion": "lion.jpg", "bus": "bus.png", "tower": "tower.jpg"}  # part of Gradio
MAX_EXAMPLES = 6
CIFAR = "cifar10", "cifar100"
PATTERNS_GRID = 8, 8  # with which the squares of the patterns are aligned


class Example(NamedTuple):
    """An image that the page offers."""

    data: bytes  # of an image file
    label: str | None = None  # its class; "" if it is none of the model's, None if that is unknown
    queries: tuple[int, ...] = ()  # patches of interest
    target: tuple[int, ...] = ()  # patches that show what these have to find


def load_examples(
    config: dict, run_dir: Path | None, classes: list[str], grid: Grid = PATTERNS_GRID
) -> dict[str, Example]:
    """Example images by name, for a model of these classes and patches that was trained with this config."""
    dataset = config.get("dataset")
    if dataset == "patterns":
        return pattern_examples(classes, grid)
    own = sorted(run_dir.glob("images/*.jpg")) if run_dir else []  # named after their classes
    photos = {name: Path(get_image(file)) for name, file in PHOTOS.items()}
    files = {file.stem: file for file in own} | photos
    with contextlib.suppress(UserError, OSError, RuntimeError):  # if the dataset is missing or damaged, photos remain
        if dataset in CIFAR and not own:
            test = cifar_class(dataset)(config["data_dir"], train=False)
            names = test.classes[:MAX_EXAMPLES]
            images = [Image.fromarray(test.data[test.targets.index(label)]) for label in range(len(names))]
            return {name: Example(encode_image(image, "PNG"), name) for name, image in zip(names, images, strict=True)}
        if dataset in ("folder", "imagenet") and not own:
            data_class = StreamedData if "aug_repeats" in config else RunData  # a flag of train_imagenet.py alone
            split = find_split(SimpleNamespace(**config), "test", data_class.eval_splits)
            files = {name: paths[0] for name, paths in find_images(split).items()}
    examples = {}
    for name, file in list(files.items())[:MAX_EXAMPLES]:
        with contextlib.suppress(ValueError, OSError):  # unreadable, or larger than uploads may be
            thumbnail(data := file.read_bytes())  # cached for the page
            examples[name] = Example(data, name if name in classes else "" if own or dataset in CIFAR else None)
    return examples or {name: Example(file.read_bytes()) for name, file in photos.items()}


def pattern_examples(classes: list[str], grid: Grid) -> dict[str, Example]:
    """The first test image of each texture. Queries are patches of the plain square, targets those of the texture.

    On another grid than PATTERNS_GRID, there are neither.
    """
    examples = {}
    for pixels, label in zip(*(part[:32] for part in patterns(2000, "test")), strict=True):
        patches = rearrange(pixels, "c (Y p) (X q) -> (Y X) (p q) c", Y=PATTERNS_GRID[0], X=PATTERNS_GRID[1])
        is_plain = (patches == patches[:, :1]).all(dim=(1, 2))
        has_color = (patches == patches[is_plain][0, 0]).all(dim=2).any(dim=1)
        masks = (is_plain, has_color & ~is_plain) if tuple(grid) == PATTERNS_GRID else ()
        queries_and_target = [tuple(mask.nonzero()[:, 0].tolist()) for mask in masks]
        file = encode_image(Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy()), "PNG")
        examples.setdefault(classes[label], Example(file, classes[label], *queries_and_target))
    return examples


@functools.cache
def thumbnail(data: bytes) -> str:
    """A small version of an image file, as a data URL. Raises ValueError for what `load_upload` refuses."""
    small = center_crop(load_upload(data, MIN_SIZE), 96, 96)
    return data_url(encode_image(small, "JPEG", quality=85), "jpeg")
