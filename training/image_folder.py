"""Full-size pictures from files: worker processes decode and crop them, every draw a function of seed and place."""

import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, RandAugment, RandomResizedCrop
from torchvision.transforms.functional import center_crop, resize
from tqdm import tqdm

from pictures import open_picture
from training.data import (
    Pictures,
    epoch_order,
    flatten,
    list_pictures,
    list_tree,
    load_pictures,
    scale,
    share_of_steps,
    to_tensor,
)
from training.distributed import rank, world_size
from training.loop import stream
from training.patterns import SIZE as PATTERN_SIZE

EVAL_CROP = 0.875  # of the shorter side: 224 of 256, as usual for ImageNet


class PictureFiles(Dataset):
    """Labelled picture files, read on demand. An item is an image (uint8, 3 size size), its label, and its own index.

    Items are asked for by (index, seed); the index that comes back is negative, -1 - index, where the file could not be
    read, and the image then that of the next one that could.
    """

    def __init__(self, files: list[Path], labels: Tensor, size: int, augment: int | None = None):
        """`augment` is the magnitude of RandAugment (0..10) for training, None for evaluation."""
        self.files = np.array([os.fsencode(file) for file in files])  # one block, which forked workers share
        self.labels, self.size, self.augment = labels, size, augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        index, seed = key
        torch.manual_seed(seed)
        for other in range(len(self.files)):
            place = (index + other) % len(self.files)
            try:
                image = self.read(self.path(place))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # Pillow's words for a bad file
                continue
            return image, int(self.labels[place]), index if other == 0 else -1 - index
        raise ValueError("none of the pictures can be read")

    def path(self, index: int) -> Path:
        """The file of a picture."""
        return Path(os.fsdecode(self.files[index]))

    def read(self, file: Path) -> Tensor:
        """The part of a picture to train or evaluate on. Raises what Pillow raises for a bad file."""
        if self.augment is None:
            return to_tensor(evaluation_crop(file, self.size))
        part = random_resized_crop(file, self.size)
        if self.augment > 0:  # eleven steps from nothing to the most, so that 9 is the m9 of DeiT's recipe
            part = RandAugment(2, self.augment, num_magnitude_bins=11)(part)
        return to_tensor(part)


def random_resized_crop(file: Path, size: int) -> Image.Image:
    """A random part of a picture, 8 to 100% of its area, sides 3:4 to 4:3, scaled to size x size."""
    picture, box = decode_part(file, size)
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=box)


def decode_part(file: Path, size: int) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """A picture in RGB and the box in it for random_resized_crop.

    A JPEG is decoded at the smallest of its built-in scales that still has `size` pixels in the box.
    """
    with Image.open(file) as picture:
        if picture.format != "JPEG":  # 16 bits, transparency
            picture = open_picture(file)
        top, left, height, width = RandomResizedCrop.get_params(picture, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
        full_width, full_height = picture.size
        picture.draft("RGB", (math.ceil(full_width * size / width), math.ceil(full_height * size / height)))
        x, y = picture.width / full_width, picture.height / full_height
        return picture.convert("RGB"), (left * x, top * y, (left + width) * x, (top + height) * y)


def evaluation_crop(file: Path, size: int) -> Image.Image:
    """The middle of a picture, 7/8 of its shorter side, scaled to size x size."""
    with Image.open(file) as picture:
        whole = picture.convert("RGB") if picture.format == "JPEG" else open_picture(file)
        part = resize(whole, round(size / EVAL_CROP), InterpolationMode.BICUBIC)
    return center_crop(part, [size, size])


class Generated(Dataset):
    """Pictures that are in memory already, behind the interface of PictureFiles."""

    def __init__(self, pictures: Pictures, size: int):
        self.images, self.labels, self.size = pictures.images, pictures.labels, size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        return scale(self.images[key[0]], self.size), int(self.labels[key[0]]), key[0]


def open_tree(
    root: Path, size: int, magnitude: int, evaluating: bool = False
) -> tuple[PictureFiles, PictureFiles, list[str]]:
    """The training and the validation pictures of a tree train/CLASS/*, val/CLASS/*, and the names of the classes.

    To evaluate, val/ is enough; it then stands for both.
    Raises ValueError or FileNotFoundError, saying what to do, where the tree is not one.
    """
    if evaluating and not (root / "train").is_dir() and (root / "val").is_dir():
        train = val = list_pictures(root / "val")
    elif not (root / "train").is_dir():
        raise FileNotFoundError(
            f"{root} must hold ImageNet as train/WNID/*.JPEG and val/WNID/*.JPEG (or your pictures as train/CLASS/*, "
            "val/CLASS/*); to try without, --dataset patterns, or train_cifar.py, which downloads CIFAR-10"
        )
    else:
        train, val = list_tree(root, held_out=("val", "test"))
    classes = list(train)
    return PictureFiles(*flatten(train, classes), size, magnitude), PictureFiles(*flatten(val, classes), size), classes


def generated(size: int) -> tuple[Generated, Generated, list[str]]:
    """What open_tree gives, of the generated patterns."""
    train, test = load_pictures("patterns", "", PATTERN_SIZE, torch.device("cpu"))
    return Generated(train, size), Generated(test, size), train.classes


def training_batches(
    indices: Tensor, batch_size: int, seed: int, epoch: int, first: int, repeats: int, length: int | None = None
) -> list:
    """What a DataLoader asks a data set for, in this process, from step `first` of an epoch on: (index, seed) pairs."""
    order = indices[epoch_order(len(indices), seed, epoch, repeats, length)].tolist()
    base = stream(seed, "pictures", epoch)
    places = share_of_steps(torch.arange(len(order)), batch_size, first)
    return [[(order[place], base + place) for place in batch.tolist()] for batch in places]


def evaluation_batches(count: int, batch_size: int) -> list:
    """All pictures once: this process's share of them."""
    own = [(index, 0) for index in range(rank(), count, world_size())]
    return [own[start : start + batch_size] for start in range(0, len(own), batch_size)]


def load(
    dataset: Dataset, batches: list, workers: int, device: torch.device, skip_bad: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (uint8) and labels on the device, decoded by worker processes ahead of time.

    Ends the process at a file that cannot be read, naming it; with skip_bad, names it and takes another picture.
    """
    pin = device.type == "cuda"
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin, worker_init_fn=_linger)
    for images, labels, indices in loader:
        for index in indices[indices < 0].tolist():
            problem = f"{dataset.path(-1 - index)} cannot be read as a picture"
            if not skip_bad:
                sys.exit(f"\n{problem}: mend or remove it (or, in training, add --skip-bad-images), then --resume")
            tqdm.write(f"{problem}; the next one took its place")
        yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def _linger(_):
    """A worker leaves signals, which a terminal or Slurm sends to all, to the process that trains, for ten seconds."""

    def note(number: int, _):
        signal.alarm(10)  # time to finish the step and save
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, note)
