"""Datasets that fit in memory: CIFAR, folders of small images, and patterns, as uint8 tensors on the device."""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2
from tqdm import tqdm

from convit_min import MODELS
from images import center_crop, default_crop_pct, load_image, normalize, to_tensor
from training.augment import derive_seed
from training.distributed import UserError, barrier, local_rank, print0, rank, world_size
from training.patterns import TEXTURES, patterns
from weights import list_names

CIFAR = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
DATASETS = [*CIFAR, "folder", "patterns"]
NUM_SAMPLES = 64  # images on which the heads are measured every epoch


class ImageSet(NamedTuple):
    """Labeled images of one size."""

    images: Tensor  # uint8, n 3 H W
    labels: Tensor  # int64, n
    classes: list[str]
    files: list[Path] | None = None  # if they come from files

    def to(self, device: torch.device) -> "ImageSet":
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))

    def select(self, index: Tensor) -> "ImageSet":
        """The images of these indices."""
        files = self.files and [self.files[position] for position in index.tolist()]
        index = index.to(self.images.device)
        return self._replace(images=self.images[index], labels=self.labels[index], files=files)


class InMemoryData:
    """The training and evaluation images of a run, in the memory of its device."""

    def __init__(self, config, device: torch.device, crop_pct: float | None = None):
        """Raises UserError, saying what to do, if images are missing or unusable.

        `crop_pct` is the fraction of the sides of an evaluation image that is kept, by default that of its size.
        """
        config.dataset = config.dataset or infer_dataset(config.data_dir, type(config).data_dir)
        img_size = config.img_size or MODELS[config.model].img_size
        crop_pct = crop_pct or default_crop_pct(img_size, img_size)
        train, test = load_datasets(config.dataset, config.data_dir, img_size, device, config.workers, crop_pct)
        if config.val_fraction:
            train, test = map(train.select, split_train_val(train.labels.cpu(), config.val_fraction, config.seed))
        if config.data_fraction < 1:
            train = train.select(stratified_subset(train.labels.cpu(), config.data_fraction, config.seed))
        self.config, self.train, self.test = config, train, test
        self.classes, self.num_train = train.classes, len(train.labels)
        self.crop_pct = crop_pct if config.dataset == "folder" else 1.0
        self.sample_images = normalize(test.select(sample_indices(len(test.labels))).images)
        self.eval_split = "validation" if config.val_fraction else "test"
        print0(f"{config.dataset} in {config.data_dir}: {self.num_train} training and {len(test.labels)} "
               f"{self.eval_split} images of {len(self.classes)} classes; {config.model}, {device}")  # fmt: skip

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels in 0..255 (b 3 H W) and labels (b) of this process, for every step of an epoch from `first_step`."""
        length = self.config.epoch_length(self.num_train)
        order = epoch_order(self.num_train, self.config.seed, epoch, length=length).to(self.train.labels.device)
        for indices in shard_batches(order, self.config.batch_size, first_step):
            yield self.train.images[indices], self.train.labels[indices]

    def eval_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All evaluation images once, over all processes: pixels, labels, and indices."""
        return eval_batches(self.test, self.config.device_batch_size)

    def eval_file(self, index: int) -> str:
        """The file of an evaluation image, or its index in the dataset."""
        return str(self.test.files[index] if self.test.files else index)


def load_datasets(
    dataset: str, data_dir: str, img_size: int, device: torch.device, workers: int = 1, crop_pct: float = 1.0
) -> tuple[ImageSet, ImageSet]:
    """The training and the test set, on the device. Raises UserError if images are missing or unusable."""
    if dataset == "folder":
        train, test = load_folder(Path(data_dir), img_size, workers, crop_pct)
    elif dataset == "patterns":
        train, test = load_patterns(img_size)
    else:
        train, test = load_cifar(dataset, data_dir, img_size)
    return train.to(device), test.to(device)


def infer_dataset(data_dir: str, default_dir: str) -> str:
    """Return "folder" if data_dir contains train/, "cifar10" if it contains CIFAR-10 or is the default folder.

    Raises UserError for any other folder, which is probably a typo.
    """
    if (Path(data_dir) / "train").is_dir():
        return "folder"
    if data_dir == default_dir or (Path(data_dir) / CIFAR["cifar10"].base_folder).is_dir():
        return "cifar10"
    raise UserError(f"{data_dir} does not contain train/CLASS/*; to download CIFAR-10 there, add --dataset cifar10")


def load_cifar(dataset: str, data_dir: str, img_size: int = 32) -> tuple[ImageSet, ImageSet]:
    """CIFAR-10 or CIFAR-100; torchvision downloads and verifies it if data_dir does not contain it."""
    if local_rank() > 0:
        barrier()  # local rank 0 downloads
    sets = []
    for train in (True, False):
        try:
            cifar = CIFAR[dataset](data_dir, train=train, download=True)
        except (OSError, RuntimeError) as error:  # no network, a refused download, a damaged archive
            raise UserError(
                f"{dataset} is not in {data_dir} and could not be downloaded ({error}); put its archive there, "
                "or train on your own images with --data-dir DIR (DIR/train/CLASS/*, DIR/test/CLASS/*)"
            ) from error
        images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
        sets.append(ImageSet(resize(images, img_size), torch.tensor(cifar.targets), cifar.classes))
    if local_rank() == 0:
        barrier()
    return sets[0], sets[1]


def load_patterns(img_size: int) -> tuple[ImageSet, ImageSet]:
    """The synthetic patterns dataset: 20,000 training and 2,000 test images."""
    sets = []
    for count, split in ((20_000, "train"), (2_000, "test")):
        images, labels = patterns(count, split)
        sets.append(ImageSet(resize(images, img_size), labels, TEXTURES))
    return sets[0], sets[1]


def resize(images: Tensor, size: int) -> Tensor:
    """Square images (... 3 H H) resized to size x size."""
    if images.shape[-1] == size:
        return images
    chunks = images.split(1000)  # resizing takes four bytes per uint8 pixel
    return torch.cat([v2.functional.resize(chunk, [size, size]) for chunk in chunks])


def load_folder(root: Path, img_size: int, workers: int = 1, crop_pct: float = 1.0) -> tuple[ImageSet, ImageSet]:
    """A tree train/CLASS/* and test/CLASS/* or val/CLASS/*; images are center-cropped to squares of img_size.

    Of evaluation images, the fraction `crop_pct` of the sides is kept.
    """
    train, test = find_splits(root)
    if train.keys() != test.keys():
        unmatched = list_names(train.keys() ^ test.keys())
        raise UserError(f"the training and test sets of {root} must have the same classes; unmatched: {unmatched}")
    return decode(train, img_size, workers, "train"), decode(test, img_size, workers, "test", crop_pct)


def find_splits(root: Path, eval_splits: tuple[str, str] = ("test", "val")) -> tuple[dict, dict]:
    """Image files by class in train/ and in the first of `eval_splits` that exists.

    Raises UserError for folders that cannot be trained on.
    """
    train_dir = root / "train"
    test_dir = root / eval_splits[0] if (root / eval_splits[0]).is_dir() else root / eval_splits[1]
    if not (train_dir.is_dir() and test_dir.is_dir()):
        raise UserError(f"{root} must contain train/CLASS/* and test/CLASS/* (or val/CLASS/*)")
    train, test = find_images(train_dir), find_images(test_dir)
    if len(train) < 2:
        raise UserError(f"{train_dir} contains a single class, {next(iter(train))}; at least two are needed")
    if not test.keys() <= train.keys():
        unknown = list_names(test.keys() - train.keys())
        raise UserError(f"{test_dir} has classes that are missing from {train_dir}: {unknown}")
    return train, test


def find_images(folder: Path) -> dict[str, list[Path]]:
    """The files of every class folder, both sorted by name; hidden files are skipped. Raises UserError."""
    try:
        classes = {
            entry.name: sorted(
                Path(file.path) for file in os.scandir(entry) if file.is_file() and not file.name.startswith(".")
            )
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name)  # faster than Path for 1.3M files
            if entry.is_dir() and not entry.name.startswith(".")
        }
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error
    if not classes:
        raise UserError(f"{folder} contains no class folders; put the images into {folder}/CLASS/")
    for name, files in classes.items():
        if not files:
            raise UserError(f"{folder / name} contains no images; add some, or remove the folder")
    return classes


def flatten_tree(tree: dict[str, list[Path]], classes: list[str]) -> tuple[list[Path], Tensor]:
    """The files of a tree, class by class, and their labels (n); a class may be empty."""
    files = [file for name in classes for file in tree.get(name, [])]
    return files, torch.tensor([label for label, name in enumerate(classes) for _ in tree.get(name, [])])


def decode(tree: dict[str, list[Path]], img_size: int, workers: int, split: str, crop_pct: float = 1.0) -> ImageSet:
    """Decode all images, in parallel, into one uint8 tensor. Raises UserError for a file that is not an image."""
    files, labels = flatten_tree(tree, list(tree))
    images = torch.empty(len(files), 3, img_size, img_size, dtype=torch.uint8)

    def read(index: int):
        images[index] = to_tensor(center_crop(load_image(files[index]), img_size, img_size, crop_pct))

    with ThreadPoolExecutor(max(workers, 1)) as pool:  # Pillow releases the GIL while it decodes
        results = pool.map(read, range(len(files)))
        try:
            for _ in tqdm(results, f"reading {split}", len(files), leave=False, disable=None):
                pass
        except ValueError as error:
            pool.shutdown(cancel_futures=True)
            raise UserError(f"{error}; repair or remove it") from error
    return ImageSet(images, labels, list(tree), files)


def stratified_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Sorted indices of a random fraction of every class, at least one image each."""
    if fraction == 1:
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(derive_seed(seed, "subset"))
    order = torch.randperm(len(labels), generator=generator)
    shuffled_labels, selected = labels[order], []
    for label in labels.unique().tolist():
        class_indices = order[shuffled_labels == label]
        selected.append(class_indices[: max(round(fraction * len(class_indices)), 1)])
    return torch.cat(selected).sort().values


def split_train_val(labels: Tensor, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted indices for training, and of a random fraction of every class for validation.

    Raises UserError if no training image is left.
    """
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    is_val[stratified_subset(labels, val_fraction, seed)] = True
    if is_val.all():
        raise UserError(f"--val-fraction {val_fraction:g} leaves no training images: lower it")
    return (~is_val).nonzero()[:, 0], is_val.nonzero()[:, 0]


def epoch_order(num_train: int, seed: int, epoch: int, repeats: int = 1, length: int | None = None) -> Tensor:
    """Indices of the training images in the order of an epoch.

    An epoch is one pass over all images; with `repeats`, an image appears that many times in a row, so an epoch has
    fewer distinct images. With another `length`, epochs are consecutive slices of the sequence of all passes.
    The order depends neither on the number of processes nor on whether a run was resumed.
    """
    length = length or num_train
    start, end = (epoch - 1) * length, epoch * length  # in the sequence of all passes
    passes = []
    for index in range(start // num_train, math.ceil(end / num_train)):
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", index + 1))
        passes.append(torch.randperm(num_train, generator=generator).repeat_interleave(repeats)[:num_train])
    return torch.cat(passes)[start % num_train :][:length]


def shard_batches(order: Tensor, batch_size: int, first_step: int = 0) -> Iterator[Tensor]:
    """This process's share of every global batch from `first_step` on; an incomplete last batch is dropped."""
    for step in range(first_step, len(order) // batch_size):
        yield order[step * batch_size : (step + 1) * batch_size][rank() :: world_size()]


def eval_batches(image_set: ImageSet, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This process's share of all images, every image once: pixels, labels, and indices."""
    images, labels = image_set.images, image_set.labels
    tensors = images, labels, torch.arange(len(labels), device=labels.device)
    return zip(*(tensor[rank() :: world_size()].split(batch_size) for tensor in tensors), strict=True)


def sample_indices(num_images: int) -> Tensor:
    """Evenly spaced indices, so that sorted classes are all represented."""
    return torch.linspace(0, num_images - 1, min(num_images, NUM_SAMPLES)).long()
