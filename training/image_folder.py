"""Large image folders such as ImageNet: worker processes decode and crop, every random draw derived from the seed."""

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandAugment, RandomResizedCrop
from tqdm import tqdm

from convit_min import MODELS
from images import center_crop, default_crop_pct, load_image, normalize, to_tensor
from training.augment import derive_seed
from training.checkpoint import rerun
from training.data import (
    InMemoryData,
    epoch_order,
    find_images,
    find_splits,
    flatten_tree,
    sample_indices,
    shard_batches,
    split_train_val,
    stratified_subset,
)
from training.distributed import RankError, UserError, from_rank0, print0, rank, world_size

ORIENTATION = 0x0112  # EXIF tag
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for a damaged file


class ImageFolderDataset(Dataset):
    """Labeled image files, decoded on demand: an item is an image (uint8, 3 size size), its label, and an error.

    Items are requested by (index, seed). The error is empty, or names a file that cannot be read; image and label are
    then those of the next readable file.
    """

    def __init__(
        self, files: list[Path], labels: Tensor, size: int, rand_augment: int | None = None, crop_pct: float = 1.0
    ):
        """`rand_augment` is the magnitude of RandAugment (0..10) for training; None for evaluation, on `crop_pct`."""
        self.files = np.array([os.fsencode(file) for file in files])  # a single block, shared by forked workers
        self.labels, self.size, self.rand_augment, self.crop_pct = labels, size, rand_augment, crop_pct

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, str]:
        first, seed = key
        torch.manual_seed(seed)
        for attempt in range(len(self.files)):
            index = (first + attempt) % len(self.files)
            try:
                image = self.read(self.path(index))
            except UNREADABLE:
                continue
            error = "" if attempt == 0 else f"{self.path(first)} is not a readable image"
            return image, int(self.labels[index]), error
        raise UserError("none of the images can be read")

    def path(self, index: int) -> Path:
        """The file of an image."""
        return Path(os.fsdecode(self.files[index]))

    def read(self, file: Path) -> Tensor:
        """Decode a file and crop it for training or evaluation. Raises one of UNREADABLE for a damaged file."""
        if self.rand_augment is None:
            return to_tensor(center_crop(load_image(file), self.size, self.size, self.crop_pct))
        image = random_resized_crop(file, self.size)
        if self.rand_augment > 0:  # bins 0..10, so that 9 is the m9 of DeiT's recipe
            image = RandAugment(2, self.rand_augment, num_magnitude_bins=11)(image)
        return to_tensor(image)


class StreamedData:
    """The training and evaluation images of a run, decoded by worker processes ahead of time."""

    def __init__(self, config, device: torch.device, crop_pct: float | None = None):
        """Raises UserError, saying what to do, if folders are missing or unusable.

        `crop_pct` is the fraction of the sides of an evaluation image that is kept, by default that of its size.
        """
        size = config.img_size or MODELS[config.model].img_size
        val_suffices = config.eval and not config.val_fraction
        train, test = from_rank0(find_imagenet, Path(config.data_dir), val_suffices)
        self.config, self.device, self.classes = config, device, list(train)
        self.crop_pct = crop_pct or default_crop_pct(size, size)
        self.train = ImageFolderDataset(*flatten_tree(train, self.classes), size, config.rand_augment)
        self.test = ImageFolderDataset(*flatten_tree(test, self.classes), size, crop_pct=self.crop_pct)
        labels, indices = self.train.labels, torch.arange(len(self.train))
        if config.val_fraction:
            indices, val_indices = split_train_val(labels, config.val_fraction, config.seed)
            val_files = [self.train.path(index) for index in val_indices.tolist()]
            self.test = ImageFolderDataset(val_files, labels[val_indices], size, crop_pct=self.crop_pct)
        self.train_indices = indices[stratified_subset(labels[indices], config.data_fraction, config.seed)]
        self.num_train, self.eval_split = len(self.train_indices), "validation"
        samples = [self.test[index, 0][0] for index in sample_indices(len(self.test)).tolist()]
        self.sample_images = normalize(torch.stack(samples).to(device))
        print0(f"{config.dataset} in {config.data_dir}: {self.num_train} training and {len(self.test)} validation "
               f"images of {len(self.classes)} classes; {config.model}, {device}")  # fmt: skip

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels in 0..255 (b 3 H W) and labels (b) of this process, for every step of an epoch from `first_step`."""
        config, length = self.config, self.config.epoch_length(self.num_train)
        order = epoch_order(self.num_train, config.seed, epoch, config.aug_repeats, length)
        indices, seed = self.train_indices[order].tolist(), derive_seed(config.seed, "images", epoch)
        shards = shard_batches(torch.arange(length), config.batch_size, first_step)
        batches = [[(indices[position], seed + position) for position in shard.tolist()] for shard in shards]
        yield from self._load(self.train, batches, config.skip_bad_images)

    def eval_batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All evaluation images once, over all processes: pixels, labels, and indices."""
        indices = torch.arange(rank(), len(self.test), world_size()).split(self.config.device_batch_size)
        batches = [[(index, 0) for index in batch.tolist()] for batch in indices]
        for batch, (images, labels) in zip(indices, self._load(self.test, batches), strict=True):
            yield images, labels, batch.to(self.device, non_blocking=True)

    def eval_file(self, index: int) -> str:
        """The file of an evaluation image."""
        return str(self.test.path(index))

    def _load(self, dataset: Dataset, batches: list, skip_bad: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels on the device. Raises UserError for an unreadable file, unless they are to be skipped."""
        pin = self.device.type == "cuda"
        workers = self.config.workers
        loader = DataLoader(
            dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin, worker_init_fn=_defer_signals
        )
        for images, labels, errors in loader:
            for error in filter(None, errors):
                if not skip_bad:
                    advice = "repair it, or add --skip-bad-images" if dataset is self.train else "repair or remove it"
                    raise RankError(f"{error}: {advice}, then {rerun(Path(self.config.run))}")
                tqdm.write(f"{error}; the next one replaces it")
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def load_data(config, device: torch.device, crop_pct: float | None = None) -> InMemoryData | StreamedData:
    """The data of train_imagenet.py: synthetic patterns, or an image folder."""
    data_class = InMemoryData if config.dataset == "patterns" else StreamedData
    return data_class(config, device, crop_pct)


def find_imagenet(root: Path, val_suffices: bool) -> tuple[dict, dict]:
    """Image files by class in train/ and val/ (or test/); if `val_suffices`, val/ stands in for a missing train/.

    Raises UserError, saying what to do, if the folders are missing or unusable.
    """
    if (root / "train").is_dir():
        return find_splits(root, eval_splits=("val", "test"))
    if val_suffices and (root / "val").is_dir():
        val = find_images(root / "val")
        return val, val
    raise UserError(
        f"{root} must contain ImageNet as train/WNID/*.JPEG and val/WNID/*.JPEG (or your images as train/CLASS/*, "
        "val/CLASS/*); without data, try --dataset patterns, or train_cifar.py, which downloads CIFAR-10"
    )


def random_resized_crop(file: Path, size: int) -> Image.Image:
    """A random crop of an image, 8 to 100% of its area, aspect ratio 3:4 to 4:3, resized to size x size."""
    image, box = decode_crop(file, size)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def decode_crop(file: Path, size: int) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """An image in RGB and the box in it for `random_resized_crop`.

    A JPEG is decoded at the smallest of its built-in scales that leaves `size` pixels in the box.
    """
    with Image.open(file) as image:
        if image.format != "JPEG" or image.getexif().get(ORIENTATION, 1) != 1:  # 16 bits, transparency, or rotated
            image = load_image(file)
        top, left, height, width = RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
        full_width, full_height = image.size
        image.draft("RGB", (math.ceil(full_width * size / width), math.ceil(full_height * size / height)))
        x, y = image.width / full_width, image.height / full_height
        return image.convert("RGB"), (left * x, top * y, (left + width) * x, (top + height) * y)


def _defer_signals(_):
    """Workers ignore SIGINT and delay SIGTERM by 60 s, so that the main process can finish and save its step."""

    def terminate_later(number: int, _):
        signal.alarm(60)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate_later)
