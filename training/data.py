"""Pictures for training: whole data sets as uint8 tensors on the device, augmented there, image by image."""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

from pictures import middle, open_picture
from training.distributed import local_rank, rank, wait, world_size
from training.loop import stream
from training.patterns import TEXTURES, patterns

CIFAR = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
DATASETS = [*CIFAR, "folder", "patterns"]


class Pictures(NamedTuple):
    """A labelled set of pictures of one size."""

    images: Tensor  # uint8, n c H W
    labels: Tensor  # int64, n
    classes: list[str]

    def to(self, device: torch.device) -> "Pictures":
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))

    def pick(self, chosen: Tensor) -> "Pictures":
        """The pictures of these indices, or where a mask is True."""
        return self._replace(images=self.images[chosen], labels=self.labels[chosen])


def load_pictures(
    dataset: str, data_dir: str, img_size: int, device: torch.device, workers: int = 1
) -> tuple[Pictures, Pictures]:
    """The training and the test set, on the device.

    Raises ValueError or FileNotFoundError, saying what to do, where pictures are missing or unusable.
    """
    if dataset == "folder":
        train, test = load_folder(Path(data_dir), img_size, workers)
    elif dataset == "patterns":
        train, test = (generate(count, split, img_size) for count, split in ((20_000, "train"), (2_000, "test")))
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
    if local_rank() > 0:
        wait()  # until the first process of this machine has downloaded it
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
        sets.append(Pictures(scale(images, img_size), torch.tensor(cifar.targets), cifar.classes))
    if local_rank() == 0:
        wait()
    return sets[0], sets[1]


def generate(count: int, split: str, img_size: int) -> Pictures:
    """The generated patterns of a split."""
    images, labels = patterns(count, split)
    return Pictures(scale(images, img_size), labels, TEXTURES)


def scale(images: Tensor, size: int) -> Tensor:
    """Square pictures (... 3 H H) as pictures of size x size."""
    if images.shape[-1] == size:
        return images
    parts = images.split(1000)  # the arithmetic takes four bytes where a pixel takes one
    return torch.cat([v2.functional.resize(part, [size, size]) for part in parts])


def load_folder(root: Path, img_size: int, workers: int = 1) -> tuple[Pictures, Pictures]:
    """A tree train/CLASS/* and test/CLASS/* or val/CLASS/*; of each picture the middle square, img_size wide."""
    train, test = list_tree(root)
    if train.keys() != test.keys():
        odd = some(train.keys() ^ test.keys())
        raise ValueError(f"training and test folders of {root} must have the same classes; only one of them has {odd}")
    return decode(train, img_size, workers, "train"), decode(test, img_size, workers, "test")


def list_tree(root: Path, held_out: tuple[str, str] = ("test", "val")) -> tuple[dict, dict]:
    """The files of every class in train/ and in the first of `held_out` that is there.

    Raises FileNotFoundError or ValueError for folders that cannot be trained on.
    """
    train_dir = root / "train"
    test_dir = root / held_out[0] if (root / held_out[0]).is_dir() else root / held_out[1]
    if not (train_dir.is_dir() and test_dir.is_dir()):
        raise FileNotFoundError(f"{root} must hold pictures as train/CLASS/* and test/CLASS/* (or val/CLASS/*)")
    train, test = list_pictures(train_dir), list_pictures(test_dir)
    if len(train) < 2:
        raise ValueError(f"{train_dir} holds one class only, {next(iter(train))}: add a second to tell it from")
    if not test.keys() <= train.keys():
        raise ValueError(f"{test_dir} has classes that {train_dir} lacks: {some(test.keys() - train.keys())}")
    return train, test


def some(names: set[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(sorted(names)[:5]) + more


def list_pictures(folder: Path) -> dict[str, list[Path]]:
    """The files of every class folder, both sorted by name; hidden ones are passed over."""
    classes = {
        entry.name: sorted(
            Path(file.path) for file in os.scandir(entry) if file.is_file() and not file.name.startswith(".")
        )
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)  # scandir: ImageNet is 1.3 million files
        if entry.is_dir() and not entry.name.startswith(".")
    }
    if not classes:
        raise FileNotFoundError(f"{folder} holds no class folders; put the pictures into {folder}/CLASS/")
    for name, files in classes.items():
        if not files:
            raise FileNotFoundError(f"{folder / name} holds no pictures; fill it, or remove the folder")
    return classes


def flatten(tree: dict[str, list[Path]], classes: list[str]) -> tuple[list[Path], Tensor]:
    """The files of a tree, class after class, and the number of its class for each; a class may have none."""
    files = [file for name in classes for file in tree.get(name, [])]
    return files, torch.tensor([label for label, name in enumerate(classes) for _ in tree.get(name, [])])


def decode(classes: dict[str, list[Path]], img_size: int, workers: int, name: str) -> Pictures:
    """Read all pictures, in parallel, into one uint8 tensor."""
    files, labels = flatten(classes, list(classes))
    images = torch.empty(len(files), 3, img_size, img_size, dtype=torch.uint8)

    def read(index: int):
        images[index] = to_tensor(middle(open_picture(files[index]), img_size, img_size))

    with ThreadPoolExecutor(max(workers, 1)) as pool:  # Pillow decodes outside Python's lock
        try:
            for _ in tqdm(pool.map(read, range(len(files))), f"reading {name}", len(files), leave=False, disable=None):
                pass
        except ValueError:
            pool.shutdown(cancel_futures=True)
            raise
    return Pictures(images, labels, list(classes))


def to_tensor(picture: Image.Image) -> Tensor:
    """Pixels as uint8, 3 H W."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Indices of a share of every class, at least one picture of each, drawn by the seed; in order."""
    generator = torch.Generator().manual_seed(stream(seed, "subset"))
    order = torch.randperm(len(labels), generator=generator)
    chosen = []
    for label in labels.unique().tolist():
        own = order[labels[order] == label]
        chosen.append(own[: max(round(fraction * len(own)), 1)])
    return torch.cat(chosen).sort().values


def hold_out(pictures: Pictures, share: float, seed: int) -> tuple[Pictures, Pictures]:
    """All pictures but a share of every class, drawn by the seed, and that share. Raises ValueError if it is all."""
    held_back = torch.zeros_like(pictures.labels, dtype=torch.bool)
    held_back[subset(pictures.labels.cpu(), share, seed).to(held_back.device)] = True
    if held_back.all():
        raise ValueError(f"--hold-out {share:g} leaves nothing to train on: lower it")
    return pictures.pick(~held_back), pictures.pick(held_back)


def epoch_order(count: int, seed: int, epoch: int, repeats: int = 1, length: int | None = None) -> Tensor:
    """The pictures of an epoch in their order; with repeats, each comes that often in a row, and others wait.

    An epoch is one pass over all `count` pictures. If it is to have another `length`, passes follow one another, each
    in its own order, and every epoch goes on where the one before ended.
    The same for every number of processes, and for a run that is resumed.
    """
    length = length or count
    first, end = (epoch - 1) * length, epoch * length  # places in the row of all passes
    passes = []
    for number in range(first // count, math.ceil(end / count)):
        generator = torch.Generator().manual_seed(stream(seed, "order", number + 1))
        passes.append(torch.randperm(count, generator=generator).repeat_interleave(repeats)[:count])
    return torch.cat(passes)[first % count :][:length]


def share_of_steps(order: Tensor, batch_size: int, first: int = 0) -> Iterator[Tensor]:
    """What this process takes of every batch from the first on; a last short batch is left out."""
    for step in range(first, len(order) // batch_size):
        yield order[step * batch_size : (step + 1) * batch_size][rank() :: world_size()]


def test_batches(pictures: Pictures, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All pictures once: this process's share of them."""
    images, labels = (part[rank() :: world_size()] for part in (pictures.images, pictures.labels))
    return zip(images.split(batch_size), labels.split(batch_size), strict=True)
