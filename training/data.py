"""The images of a run: what all datasets share (splits, classes, order), and datasets that are kept in memory."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.contrib.concurrent import thread_map

from convit_min import MODELS
from images import default_crop_pct, load_crop, normalize
from training.augment import derive_seed
from training.distributed import UserError, barrier, from_rank0, local_rank, print0, rank, world_size
from training.folders import find_images, find_split, has_images
from training.patterns import TEXTURES, patterns
from weights import MAX_LISTED, list_names

DATASETS = ["cifar10", "cifar100", "folder", "patterns"]
MAX_NOTES = 1000  # of unreadable images: if there are more, the disk is probably gone
NUM_SAMPLES = 64  # images on which the heads are measured every epoch


@dataclass
class ImageSet:
    """Labeled images: pixels, or files to decode."""

    images: Tensor | np.ndarray  # uint8, n 3 H W; or paths, n
    labels: Tensor  # int64, n
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> "ImageSet":
        """The images of these indices, or of a mask."""
        return ImageSet(self.images[index.numpy()], self.labels[index], self.classes)


class RunData:
    """The training and evaluation images of a run. Subclasses load them.

    `num_train` and `num_eval` include unreadable files; `num_found` is `num_train` before --data-fraction.
    """

    eval_splits = "test", "val", "valid"  # names of the folder with evaluation images; the first one that exists

    def __init__(self, config, device: torch.device, crop_pct: float | None = None):
        """Raises UserError, saying what to do, if images are missing or unusable.

        `crop_pct` is the fraction of the sides of an evaluation image that is kept, by default that of its size.
        """
        config.dataset = config.dataset or from_rank0(infer_dataset, config.data_dir, type(config).data_dir)
        self.config, self.device = config, device
        self.size = config.img_size or MODELS[config.model].img_size
        self.is_folder = config.dataset in ("folder", "imagenet")
        if self.is_folder:
            self.crop_pct = crop_pct or default_crop_pct(self.size, self.size)
            self.train, self.test = from_rank0(split_sets, config, partial(load_files, config, self.eval_splits))
            self.eval_names = self.test.images
        else:
            self.crop_pct = 1.0
            self.train, self.test = split_sets(config, partial(load_images, config, self.size))
            self.eval_names = range(len(self.test))
        self.num_found = len(self.train)
        if config.data_fraction < 1 and not config.eval:
            self.train = self.train.select(stratified_subset(self.train.labels, config.data_fraction, config.seed))
        self.classes, self.num_train, self.num_eval = self.train.classes, len(self.train), len(self.test)
        self.epoch_length = config.epoch_length(self.num_train)  # in images
        has_split = self.is_folder and not config.val_fraction
        folder = find_split(config, "test", self.eval_splits) if has_split else Path("test")
        self.eval_split = "validation" if config.val_fraction or folder.name != "test" else "test"

        source = "patterns" if config.dataset == "patterns" else config.data_dir
        training = "" if config.eval else f"{self.num_train} training and "
        images = f"{training}{self.num_eval} {self.eval_split} images of {len(self.classes)} classes"
        print0(f"{source}: {images}; {config.model}, {device}")
        if has_split and folder == Path(config.data_dir):
            print0(f"note: {folder} has no splits: all its images are evaluated, including any used for training")
        if config.eval and config.val_fraction:
            same = "the same --val-fraction, --seed, and files"
            print0(f"note: these images are new to the model only if it was trained with {same}")

    def eval_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All evaluation images once, over all processes: pixels in 0..255 (b 3 H W), labels (b), and indices (b)."""
        return self._load_test(torch.arange(len(self.test))[rank() :: world_size()])

    @cached_property
    def sample_images(self) -> Tensor:
        """Evaluation images on which the heads are measured, normalized: evenly spaced."""
        count = len(self.test)
        indices = torch.linspace(0, count - 1, min(count, NUM_SAMPLES)).long()
        return normalize(torch.cat([images for images, *_ in self._load_test(indices)]))


class InMemoryData(RunData):
    """All images in the memory of the device: CIFAR, patterns, or a folder of small images."""

    def __init__(self, config, device: torch.device, crop_pct: float | None = None):
        super().__init__(config, device, crop_pct)
        if self.is_folder:
            self.train, _, bad = decode(self.train, self.size, config.workers)  # training sees all of the center
            self.test, self.eval_names, bad_test = decode(self.test, self.size, config.workers, self.crop_pct)
            is_usable = len(self.test) and (len(self.train) or config.eval)
            report_unreadable(bad + bad_test, self.num_train + self.num_eval, is_usable, config)
        try:
            for image_set in (self.train, self.test):
                image_set.images, image_set.labels = image_set.images.to(device), image_set.labels.to(device)
        except torch.OutOfMemoryError as error:
            raise UserError(f"the images do not fit into the memory of {device}: use train_imagenet.py") from error

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels in 0..255 (b 3 H W) and labels (b) of this process, for every step of an epoch from `first_step`."""
        order = epoch_order(len(self.train), self.config.seed, epoch, length=self.epoch_length).to(self.device)
        for indices in shard_batches(order, self.config.batch_size, first_step):
            yield self.train.images[indices], self.train.labels[indices]

    def _load_test(self, indices: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in indices.to(self.device).split(self.config.device_batch_size):
            yield self.test.images[batch], self.test.labels[batch], batch


def split_sets(config, load: Callable[[str], ImageSet]) -> tuple[ImageSet, ImageSet]:
    """The training and the evaluation set after --val-fraction; with --eval, the first is empty.

    `load` returns the "train" or the "test" set; neither is loaded if it is not needed. Raises UserError if the
    classes are too few, or differ.
    """
    if config.eval and not config.val_fraction:
        test = load("test")
        return test.select(torch.arange(0)), test
    train = load("train")
    if len(train.classes) < 2:
        raise UserError(f"{config.data_dir} has a single class, {train.classes[0]}; at least two are needed")
    if config.val_fraction:
        train, test = map(train.select, split_train_val(train.labels, config.val_fraction, config.seed))
        if untrained := {train.classes[label] for label in set(test.labels.tolist()) - set(train.labels.tolist())}:
            print0(f"note: --val-fraction leaves no training images of {list_names(untrained)}")
    else:
        test = load("test")
        if missing := set(train.classes) - set(test.classes):
            print0(f"note: {config.data_dir} has no evaluation images of {list_names(missing)}")
        labels = index_classes(test.classes, train.classes, "the training set")[test.labels]
        test = ImageSet(test.images, labels, train.classes)
    return train.select(torch.arange(0)) if config.eval else train, test


def index_classes(classes: list[str], known: list[str], source: str) -> Tensor:
    """The index of every class among the known ones, those of `source` (k). Raises UserError if one is not known."""
    if unknown := set(classes) - set(known):
        found = f"the evaluation images have classes that {source} lacks: {list_names(unknown)}"
        raise UserError(f"{found} (it has {list_names(known)}); rename the folders, or train on these classes")
    return torch.tensor([known.index(name) for name in classes])


def infer_dataset(data_dir: str, default_dir: str) -> str:
    """Return "cifar10" if data_dir contains CIFAR-10, or is the default folder without images; else "folder"."""
    root = Path(data_dir)
    if not has_images(root) and (data_dir == default_dir or (root / cifar_class("cifar10").base_folder).is_dir()):
        return "cifar10"
    return "folder"


def load_files(config, eval_splits: tuple[str, ...], split: str) -> ImageSet:
    """The files of the "train" or the "test" images in --data-dir. Raises UserError, with advice, if there are none."""
    tree = find_images(find_split(config, split, eval_splits))
    files = [file for files in tree.values() for file in files]
    labels = [label for label, files in enumerate(tree.values()) for _ in files]
    return ImageSet(np.array(files), torch.tensor(labels), list(tree))


def load_images(config, img_size: int, split: str) -> ImageSet:
    """The "train" or the "test" set of CIFAR or of the synthetic patterns dataset (20,000 and 2,000 images).

    torchvision downloads and verifies CIFAR if --data-dir does not contain it. Raises UserError if that fails.
    """
    if config.dataset == "patterns":
        images, labels = patterns(20_000 if split == "train" else 2_000, split)
        classes = TEXTURES
    else:
        turn = (rank() > 0) + (local_rank() > 0)  # rank 0 downloads, then local ranks 0, in case disks are not shared
        for _ in range(turn):
            barrier()
        try:
            cifar = cifar_class(config.dataset)(config.data_dir, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:  # no network, a refused download, a damaged archive
            problem = f"{config.dataset} is not in {config.data_dir} and could not be downloaded ({error})"
            own = "train on your own images with --data-dir DIR (DIR/train/CLASS/*, DIR/test/CLASS/*)"
            raise UserError(f"{problem}; put its archive there, or {own}") from error
        for _ in range(turn, 2):
            barrier()
        images, labels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(cifar.targets)
        classes = cifar.classes
    if images.shape[-1] != img_size:
        from torchvision.transforms import v2  # slow to import

        chunks = images.split(1000)  # resizing takes four bytes per uint8 pixel
        images = torch.cat([v2.functional.resize(chunk, [img_size, img_size]) for chunk in chunks])
    return ImageSet(images, labels, classes)


def cifar_class(dataset: str) -> type:
    """torchvision's class of "cifar10" or "cifar100"."""
    from torchvision import datasets  # slow to import

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[dataset]


def decode(files: ImageSet, size: int, workers: int, crop_pct: float = 1.0) -> tuple[ImageSet, np.ndarray, list[str]]:
    """Decode all files, in parallel, and center-crop them to squares of `size` pixels.

    Returns the images that can be read, their files, and the errors of the others.
    """
    try:
        pixels = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    except RuntimeError as error:  # of the allocator
        problem = f"{len(files)} images of {size} pixels do not fit into memory"
        raise UserError(f"{problem}: use train_imagenet.py") from error

    def read(index: int) -> str:
        try:
            pixels[index] = load_crop(files.images[index], size, size, crop_pct)
        except ValueError as error:
            return str(error)
        return ""

    options = {"max_workers": max(workers, 1), "desc": "reading images", "leave": False}
    options["disable"] = True if rank() > 0 else None  # None: unless the output is a terminal
    errors = thread_map(read, range(len(files)), **options)  # Pillow releases the GIL while it decodes
    decoded, bad = ImageSet(pixels, files.labels, files.classes), [error for error in errors if error]
    if not bad:  # selecting would copy all pixels
        return decoded, files.images, bad
    is_good = torch.tensor([not error for error in errors])
    return decoded.select(is_good), files.images[is_good.numpy()], bad


def report_unreadable(errors: list[str], count: int, is_usable: bool, config):
    """Name all unreadable images, of `count`. Raises UserError unless --skip-bad-images leaves enough."""
    if len(errors) > MAX_LISTED:
        print0("\n".join(f"note: {error}" for error in sorted(errors)[:MAX_NOTES]))
    message = f"{len(errors)} of {count} images cannot be read: {list_names(errors)}"
    if errors and not (config.skip_bad_images and is_usable):
        raise UserError(f"{message}; {remedy(config)}")
    if errors:
        print0(f"note: {message}; they are left out")


def remedy(config) -> str:
    """What to do about unreadable images."""
    keep = "repair such files (removing them would change the split)"
    repair = keep if config.val_fraction else "repair or remove such files"
    return repair if config.skip_bad_images else f"{repair}, or leave them out with --skip-bad-images"


def stratified_subset(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Sorted indices of a random fraction of every class, at least one image each."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "subset"))
    order = torch.randperm(len(labels), generator=generator)
    shuffled_labels, selected = labels[order], []
    for label in labels.unique().tolist():
        class_indices = order[shuffled_labels == label]
        selected.append(class_indices[: max(round(fraction * len(class_indices)), 1)])
    return torch.cat(selected).sort().values


def split_train_val(labels: Tensor, val_fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted indices of the training images, and of the validation images: a random fraction of every class.

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


def shard_batches(order: Sequence, batch_size: int, first_step: int = 0) -> Iterator[Sequence]:
    """This process's share of every global batch from `first_step` on; an incomplete last batch is dropped."""
    for step in range(first_step, len(order) // batch_size):
        yield order[step * batch_size : (step + 1) * batch_size][rank() :: world_size()]
