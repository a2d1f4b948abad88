"""Pictures for training: whole data sets as uint8 tensors on the device, augmented there, image by image."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import RandomResizedCrop, v2
from tqdm import tqdm

from pictures import middle, open_picture

CIFAR = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
DATASETS = [*CIFAR, "folder"]


class Pictures(NamedTuple):
    """A labelled set of pictures of one size."""

    images: Tensor  # uint8, n c H W
    labels: Tensor  # int64, n
    classes: list[str]

    def to(self, device: torch.device) -> "Pictures":
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))


def load_pictures(dataset: str, data_dir: str, img_size: int, device: torch.device) -> tuple[Pictures, Pictures]:
    """The training and the test set, on the device.

    Raises ValueError or FileNotFoundError, saying what to do, where pictures are missing or unusable.
    """
    if dataset == "folder":
        train, test = load_folder(Path(data_dir), img_size)
    else:
        train, test = load_cifar(dataset, data_dir, img_size)
    return train.to(device), test.to(device)


def guess_dataset(data_dir: str, default_dir: str) -> str:
    """What data_dir is for: "folder" if it holds train/, "cifar10" if it holds that or is where that goes by default.

    Raises FileNotFoundError for any other, which is more likely a slip than a place to download to.
    """
    if (Path(data_dir) / "train").is_dir():
        return "folder"
    if data_dir == default_dir or (Path(data_dir) / CIFAR["cifar10"].base_folder).is_dir():
        return "cifar10"
    raise FileNotFoundError(f"{data_dir} holds no train/CLASS/*; to download CIFAR-10 to it, add --dataset cifar10")


def load_cifar(dataset: str, data_dir: str, img_size: int = 32) -> tuple[Pictures, Pictures]:
    """CIFAR-10 or CIFAR-100 from data_dir, downloaded and checked by torchvision where it is not there yet."""
    sets = []
    for train in (True, False):
        try:
            cifar = CIFAR[dataset](data_dir, train=train, download=True)
        except (OSError, RuntimeError) as error:  # no network, a refused download, a damaged archive
            raise FileNotFoundError(
                f"{dataset} is not in {data_dir} and could not be downloaded ({error}); put its archive there, "
                "or train on your own pictures with --data-dir DIR (DIR/train/CLASS/*, DIR/test/CLASS/*)"
            ) from error
        images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
        if img_size != 32:
            images = torch.cat([v2.functional.resize(part, [img_size, img_size]) for part in images.split(1000)])
        sets.append(Pictures(images, torch.tensor(cifar.targets), cifar.classes))
    return sets[0], sets[1]


def load_folder(root: Path, img_size: int) -> tuple[Pictures, Pictures]:
    """A tree train/CLASS/* and test/CLASS/* or val/CLASS/*; of each picture the middle square, img_size wide."""
    train_dir = root / "train"
    test_dir = root / "test" if (root / "test").is_dir() else root / "val"
    if not (train_dir.is_dir() and test_dir.is_dir()):
        raise FileNotFoundError(f"{root} must hold pictures as train/CLASS/* and test/CLASS/* (or val/CLASS/*)")
    train, test = list_pictures(train_dir), list_pictures(test_dir)
    if len(train) < 2:
        raise ValueError(f"{train_dir} holds one class only, {next(iter(train))}: add a second to tell it from")
    if train.keys() != test.keys():
        odd = ", ".join(sorted(train.keys() ^ test.keys()))
        raise ValueError(f"{train_dir} and {test_dir} must have the same classes; only one of them has {odd}")
    return decode(train, img_size, "train"), decode(test, img_size, "test")


def list_pictures(folder: Path) -> dict[str, list[Path]]:
    """The files of every class folder, both sorted by name; hidden ones are passed over."""
    classes = {
        entry.name: sorted(file for file in entry.iterdir() if file.is_file() and not file.name.startswith("."))
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and not entry.name.startswith(".")
    }
    if not classes:
        raise FileNotFoundError(f"{folder} holds no class folders; put the pictures into {folder}/CLASS/")
    for name, files in classes.items():
        if not files:
            raise FileNotFoundError(f"{folder / name} holds no pictures; fill it, or remove the folder")
    return classes


def decode(classes: dict[str, list[Path]], img_size: int, name: str) -> Pictures:
    """Read all pictures, in parallel, into one uint8 tensor."""
    files = [file for files in classes.values() for file in files]
    labels = [label for label, files in enumerate(classes.values()) for _ in files]
    images = torch.empty(len(files), 3, img_size, img_size, dtype=torch.uint8)

    def read(index: int):
        pixels = np.array(middle(open_picture(files[index]), img_size, img_size))
        images[index] = torch.from_numpy(pixels).permute(2, 0, 1)

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        try:
            for _ in tqdm(pool.map(read, range(len(files))), f"reading {name}", len(files), leave=False, disable=None):
                pass
        except ValueError:
            pool.shutdown(cancel_futures=True)
            raise
    return Pictures(images, torch.tensor(labels), list(classes))


def batches(
    pictures: Pictures, batch_size: int, generator: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images and labels: given a generator shuffled and without a last short one, else all, in order."""
    n = len(pictures.images)
    if generator is None:
        yield from zip(pictures.images.split(batch_size), pictures.labels.split(batch_size), strict=True)
        return
    order = torch.randperm(n, generator=generator).to(pictures.images.device)
    for chosen in order[: n - n % batch_size].split(batch_size):
        yield pictures.images[chosen], pictures.labels[chosen]


def crop_and_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Shift every image by up to `padding` pixels and flip half of them, each on its own draw: b c H W -> b c H W."""
    b, c, height, width = images.shape
    shift = torch.randint(0, 2 * padding + 1, (2, b, 1), generator=generator)
    flip = torch.rand(b, 1, generator=generator) < 0.5
    rows = shift[0] + torch.arange(height)
    columns = shift[1] + torch.where(flip, torch.arange(width).flip(0), torch.arange(width))
    padded = torch.nn.functional.pad(images, [padding] * 4)
    rows, columns = rows.to(images.device), columns.to(images.device)
    image, channel = torch.arange(b, device=images.device), torch.arange(c, device=images.device)
    return padded[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def random_resized_crop(file: Path, size: int) -> Tensor:
    """A random part of a picture, 8 to 100% of its area, sides 3:4 to 4:3, scaled to uint8 (3 size size)."""
    picture, box = decode_part(file, size)
    part = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(part)).permute(2, 0, 1)


def decode_part(file: Path, size: int) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """A picture in RGB and the box in it for random_resized_crop.

    A JPEG is decoded at the smallest of its built-in scales that still has `size` pixels in the box.
    """
    with Image.open(file) as picture:
        top, left, height, width = RandomResizedCrop.get_params(picture, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
        full_width, full_height = picture.size
        picture.draft("RGB", (math.ceil(full_width * size / width), math.ceil(full_height * size / height)))
        x, y = picture.width / full_width, picture.height / full_height
        return picture.convert("RGB"), (left * x, top * y, (left + width) * x, (top + height) * y)
