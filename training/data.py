"""Datasets in memory (CIFAR, folders of small images, patterns), and what all datasets share: splits and order."""

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from convit_min import MODELS
from images import default_crop_pct, load_crop, normalize
from training.augment import derive_seed
from training.distributed import UserError, barrier, from_rank0, local_rank, print0, rank, world_size
from training.folders import SPLITS, describe_missing, find_images, find_split, has_class_folders
from training.patterns import TEXTURES, patterns
from weights import list_names

DATASETS = ["cifar10", "cifar100", "folder", "patterns"]
NUM_SAMPLES = 64  # images on which the heads are measured every epoch


class ImageSet(NamedTuple):
    """Labeled images of one size, or image files to decode."""

    images: Tensor | None  # uint8, n 3 H W; None before decoding
    labels: Tensor  # int64, n
    classes: list[str]
    files: list[Path] | None = None  # if they come from files

    def to(self, device: torch.device) -> "ImageSet":
        return self._replace(images=self.images.to(device), labels=self.labels.to(device))

    def select(self, index: Tensor) -> "ImageSet":
        """The images of these indices."""
        files = self.files and [self.files[position] for position in index.tolist()]
        images = None if self.images is None else self.images[index.to(self.images.device)]
        return self._replace(images=images, labels=self.labels[index.to(self.labels.device)], files=files)


class InMemoryData:
    """The training and evaluation images of a run, in the memory of its device."""

    def __init__(self, config, device: torch.device, crop_pct: float | None = None):
        """Raises UserError, saying what to do, if images are missing or unusable.

        `crop_pct` is the fraction of the sides of an evaluation image that is kept, by default that of its size.
        """
        config.dataset = config.dataset or infer_dataset(config.data_dir, type(config).data_dir)
        size = config.img_size or MODELS[config.model].img_size
        is_folder = config.dataset == "folder"
        self.config, self.crop_pct = config, (crop_pct or default_crop_pct(size, size)) if is_folder else 1.0
        if is_folder:
            train, test = from_rank0(find_image_sets, config, ("test", "val", "valid"))
        else:
            train, test = split_sets(config, lambda split: load_images(config, split, size))
        set_counts(self, train, test, device)
        if is_folder:  # training sees all of the center
            train, test = decode(train, size, config), decode(test, size, config, self.crop_pct)
        self.train, self.test = train.to(device), test.to(device)
        self.sample_images = normalize(self.test.select(sample_indices(len(test.labels))).images)

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels in 0..255 (b 3 H W) and labels (b) of this process, for every step of an epoch from `first_step`."""
        labels = self.train.labels
        order = epoch_order(len(labels), self.config.seed, epoch, length=self.epoch_length).to(labels.device)
        for indices in shard_batches(order, self.config.batch_size, first_step):
            yield self.train.images[indices], labels[indices]

    def eval_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All evaluation images once, over all processes: pixels, labels, and indices."""
        return eval_batches(self.test, self.config.device_batch_size)

    def eval_file(self, index: int) -> str:
        """The file of an evaluation image, or its index in the dataset."""
        return str(self.test.files[index] if self.test.files else index)


def set_counts(data, train: ImageSet, test: ImageSet, device: torch.device):
    """Set the attributes of a run's data that follow from its image sets, unreadable files included; print them."""
    config = data.config
    data.classes, data.num_train, data.num_eval = train.classes, len(train.labels), len(test.labels)
    data.epoch_length = config.epoch_length(data.num_train)  # in images
    data.eval_split = "validation" if config.val_fraction or config.dataset == "imagenet" else "test"
    source = "patterns" if config.dataset == "patterns" else config.data_dir
    training = "" if config.eval else f"{data.num_train} training and "
    print0(f"{source}: {training}{data.num_eval} {data.eval_split} images of {len(data.classes)} classes; "
           f"{config.model}, {device}")  # fmt: skip
    if config.eval and config.val_fraction:
        print0("note: the model has not seen these images only if it was trained with the same --val-fraction, --seed, "
               "and files")  # fmt: skip


def split_sets(config, load: Callable[[str], ImageSet]) -> tuple[ImageSet, ImageSet]:
    """The training and the evaluation set after --val-fraction and --data-fraction; with --eval, the first is empty.

    `load` returns the "train" or the "test" set; neither is loaded if it is not needed. Raises UserError if the
    classes are too few, or differ.
    """
    if config.eval and not config.val_fraction:
        test = load("test")
        return test.select(torch.arange(0)), test
    train = load("train")
    if len(train.classes) < 2:
        raise UserError(f"the images of {config.data_dir} have a single class, {train.classes[0]}; two are needed")
    if config.val_fraction:
        train, test = map(train.select, split_train_val(train.labels, config.val_fraction, config.seed))
    else:
        test = align_classes(load("test"), train.classes, config.data_dir)
    if config.eval:
        train = train.select(torch.arange(0))
    elif config.data_fraction < 1:
        train = train.select(stratified_subset(train.labels, config.data_fraction, config.seed))
    return train, test


def align_classes(test: ImageSet, classes: list[str], data_dir: str) -> ImageSet:
    """An evaluation set with labels that index the classes of training. Raises UserError if it has other classes."""
    if unknown := set(test.classes) - set(classes):
        raise UserError(f"the evaluation images of {data_dir} have classes that are missing from the training images: "
                        f"{list_names(unknown)}")  # fmt: skip
    if missing := set(classes) - set(test.classes):
        print0(f"note: {data_dir} has no evaluation images of {list_names(missing)}")
    indices = torch.tensor([classes.index(name) for name in test.classes])
    return test._replace(labels=indices[test.labels], classes=classes)


def infer_dataset(data_dir: str, default_dir: str) -> str:
    """Return "folder" if data_dir contains image folders, "cifar10" if it contains CIFAR-10 or is the default folder.

    Raises UserError for any other folder, which is probably a typo.
    """
    root = Path(data_dir)
    if any(os.path.isdir(root / split) for split in SPLITS) or has_class_folders(root):
        return "folder"
    if data_dir == default_dir or os.path.isdir(root / cifar_class("cifar10").base_folder):
        return "cifar10"
    raise UserError(describe_missing(root))


def cifar_class(dataset: str | None) -> type | None:
    """torchvision's class of a CIFAR dataset; None for any other dataset."""
    from torchvision import datasets  # slow to import

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}.get(dataset)


def load_images(config, split: str, img_size: int) -> ImageSet:
    """The "train" or the "test" set of CIFAR or of the synthetic patterns dataset (20,000 and 2,000 images)."""
    if config.dataset != "patterns":
        return load_cifar(config.dataset, config.data_dir, split, img_size)
    images, labels = patterns(20_000 if split == "train" else 2_000, split)
    return ImageSet(resize(images, img_size), labels, TEXTURES)


def load_cifar(dataset: str, data_dir: str, split: str, img_size: int = 32) -> ImageSet:
    """CIFAR-10 or CIFAR-100; torchvision downloads and verifies it if data_dir does not contain it."""
    if local_rank() > 0:
        barrier()  # local rank 0 downloads
    try:
        cifar = cifar_class(dataset)(data_dir, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:  # no network, a refused download, a damaged archive
        raise UserError(
            f"{dataset} is not in {data_dir} and could not be downloaded ({error}); put its archive there, "
            "or train on your own images with --data-dir DIR (DIR/train/CLASS/*, DIR/test/CLASS/*)"
        ) from error
    if local_rank() == 0:
        barrier()
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet(resize(images, img_size), torch.tensor(cifar.targets), cifar.classes)


def resize(images: Tensor, size: int) -> Tensor:
    """Square images (... 3 H H) resized to size x size."""
    if images.shape[-1] == size:
        return images
    from torchvision.transforms import v2  # slow to import

    chunks = images.split(1000)  # resizing takes four bytes per uint8 pixel
    return torch.cat([v2.functional.resize(chunk, [size, size]) for chunk in chunks])


def find_image_sets(config, eval_splits: tuple[str, ...]) -> tuple[ImageSet, ImageSet]:
    """The files of --data-dir as `split_sets` returns them; evaluation is on the first of `eval_splits` that exists.

    Raises UserError, saying what to do, if folders are missing or unusable.
    """

    def load(split: str) -> ImageSet:
        tree = find_images(find_split(config, split, eval_splits))
        labels = torch.arange(len(tree)).repeat_interleave(torch.tensor([len(files) for files in tree.values()]))
        return ImageSet(None, labels, list(tree), [file for files in tree.values() for file in files])

    return split_sets(config, load)


def decode(image_set: ImageSet, img_size: int, config, crop_pct: float = 1.0) -> ImageSet:
    """Decode all files, in parallel, and center-crop them to squares of img_size.

    Raises UserError for files that cannot be read; with --skip-bad-images, they are left out, with a note.
    """
    files = image_set.files
    images = torch.empty(len(files), 3, img_size, img_size, dtype=torch.uint8)

    def read(index: int) -> str:
        try:
            images[index] = load_crop(files[index], img_size, img_size, crop_pct)
        except ValueError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(max(config.workers, 1)) as pool:  # Pillow releases the GIL while it decodes
        results = pool.map(read, range(len(files)))
        errors = list(tqdm(results, "reading images", len(files), leave=False, disable=None))
    image_set = image_set._replace(images=images)
    bad = [error for error in errors if error]
    if not bad:
        return image_set
    message = f"{len(bad)} of {len(files)} images cannot be read: {list_names(bad)}"
    if not config.skip_bad_images or len(bad) == len(files):
        raise UserError(f"{message}; {remedy(config)}")
    print0(f"note: {message}; they are left out")
    return image_set.select(torch.tensor([not error for error in errors]).nonzero()[:, 0])


def remedy(config) -> str:
    """What to do about unreadable images."""
    repair = f"repair {'' if config.val_fraction else 'or remove '}such files"  # without them, the split is another
    return repair if config.skip_bad_images else f"{repair}, or leave them out with --skip-bad-images"


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
