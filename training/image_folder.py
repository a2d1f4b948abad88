"""Large image folders such as ImageNet: worker processes decode and crop, every random draw derived from the seed."""

import atexit
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from images import load_crop, open_image, to_rgb, to_tensor
from training.augment import derive_seed
from training.data import InMemoryData, RunData, epoch_order, remedy, shard_batches
from training.distributed import UserError, kill_workers

ORIENTATION = 0x0112  # EXIF tag
MAX_SKIPPED = 1000  # unreadable files in a row before giving up: the disk is probably gone


class ImageFolderDataset(Dataset):
    """Labeled image files, decoded on demand: an item is an image (uint8, 3 size size), its label, index, and an error.

    Items are requested by (index, seed). The error is empty, or says why a file cannot be read; image and label are
    then those of the next readable file, or the label is -1 if there is none among the next MAX_SKIPPED.
    """

    def __init__(self, files: list, labels: Tensor, size: int, rand_augment: int | None = None, crop_pct: float = 1.0):
        """`rand_augment` is the magnitude of RandAugment (1..10; 0: off) in training; None: evaluate on `crop_pct`."""
        self.files = np.array([os.fsencode(file) for file in files])  # a single block, shared by forked workers
        self.labels, self.size, self.rand_augment, self.crop_pct = labels, size, rand_augment, crop_pct
        if rand_augment is not None:
            from torchvision.transforms import Compose, RandAugment, RandomApply  # slow: once, before forking

            operation = RandAugment(1, rand_augment, num_magnitude_bins=11)  # bins 0..10, so that 9 is DeiT's m9
            self.augment = Compose([RandomApply([operation])] * 2)  # each with probability 1/2, as in timm

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int, str]:
        first, seed = key
        error, attempts = "", min(len(self), MAX_SKIPPED)
        for position in range(first, first + attempts):
            index = position % len(self)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed also captures stack traces
            try:
                return self.read(os.fsdecode(self.files[index])), int(self.labels[index]), first, error
            except ValueError as reason:
                error = error or str(reason)
        error = f"none of {attempts} files in a row can be read: {error}"
        return torch.empty(3, self.size, self.size, dtype=torch.uint8), -1, first, error

    def read(self, file: str | Path) -> Tensor:
        """Decode a file and crop it for training or evaluation. Raises ValueError if it cannot be read."""
        if self.rand_augment is None:
            return load_crop(file, self.size, self.size, self.crop_pct)
        image = random_resized_crop(file, self.size)
        return to_tensor(self.augment(image) if self.rand_augment > 0 else image)


class StreamedData(RunData):
    """Images of a folder, decoded by worker processes ahead of time."""

    eval_splits = "val", "valid", "test"

    def __init__(self, config, device: torch.device, crop_pct: float | None = None):
        super().__init__(config, device, crop_pct)
        self.train = ImageFolderDataset(self.train.images, self.train.labels, self.size, config.rand_augment)
        self.test = ImageFolderDataset(self.test.images, self.test.labels, self.size, crop_pct=self.crop_pct)
        self.reported = set()  # errors
        atexit.register(kill_workers)  # also after a bug: Python would send SIGTERM, which workers defer, and wait

    def train_batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels in 0..255 (b 3 H W) and labels (b) of this process, for every step of an epoch from `first_step`."""
        config, length = self.config, self.epoch_length
        order = epoch_order(self.num_train, config.seed, epoch, config.aug_repeats, length)
        seed = derive_seed(config.seed, "images", epoch)
        keys = torch.stack([order, torch.arange(seed, seed + length)], dim=1)  # n 2
        batches = (batch.tolist() for batch in shard_batches(keys, config.batch_size, first_step))
        for images, labels, _ in self._load(self.train, batches):
            yield images, labels

    def _load_test(self, indices: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        batches = indices.split(self.config.device_batch_size)  # an empty one if there are fewer images than processes
        return self._load(self.test, ([(index, 0) for index in batch.tolist()] for batch in batches if len(batch)))

    def _load(self, dataset: ImageFolderDataset, batches: Iterable[list]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images, labels, and indices on the device.

        Raises UserError for an unreadable file. With --skip-bad-images, it is replaced in training, and left out in
        evaluation.
        """
        config, batches = self.config, list(batches)
        options = {"num_workers": min(config.workers, len(batches)), "pin_memory": self.device.type == "cuda"}
        if options["num_workers"] and sys.platform == "linux":  # workers of Python 3.14 would import everything
            options["multiprocessing_context"] = "fork"
        loader = DataLoader(dataset, batch_sampler=batches, worker_init_fn=_defer_signals, **options)
        for *tensors, errors in loader:
            bad = set(filter(None, errors))
            if bad and (not config.skip_bad_images or -1 in tensors[1]):
                can_resume = not config.eval and Path(config.run, "last.pt").exists()
                then = "rerun with --resume" if can_resume else "rerun"
                hint = "" if config.skip_bad_images else ", which reports each one that it finds"
                raise UserError(f"{min(bad)}: {remedy(config)}{hint}; then {then}")
            for error in bad - self.reported:
                fate = "the next one replaces it" if dataset is self.train else "it is left out"
                tqdm.write(f"{error}; {fate}", file=sys.stderr)  # unbuffered, so that abort does not lose it
            self.reported |= bad
            if bad and dataset is self.test:
                tensors = [tensor[[not error for error in errors]] for tensor in tensors]
            if len(tensors[0]):
                yield tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)


def load_data(config, device: torch.device, crop_pct: float | None = None) -> RunData:
    """The data of train_imagenet.py: synthetic patterns, or an image folder."""
    data_class = InMemoryData if config.dataset == "patterns" else StreamedData
    return data_class(config, device, crop_pct)


def random_resized_crop(file: str | Path, size: int) -> Image.Image:
    """A random crop of an image, 8 to 100% of its area, aspect ratio 3:4 to 4:3, resized to size x size.

    A JPEG is decoded at the smallest of its built-in scales that leaves `size` pixels in the crop.
    """
    from torchvision.transforms import RandomResizedCrop  # slow to import

    with open_image(file) as image:
        try:
            is_upright = image.getexif().get(ORIENTATION, 1) == 1
        except SyntaxError:  # of Pillow, if the EXIF data are damaged
            is_upright = True
        if image.format != "JPEG" or not is_upright:  # 16 bits, transparency, or rotated
            image.draft(None, (4 * size, 4 * size))  # leaves `size` pixels in the smallest box
            image = to_rgb(image)
        top, left, height, width = RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
        full_width, full_height = image.size
        image.draft("RGB", (math.ceil(full_width * size / width), math.ceil(full_height * size / height)))
        x, y = image.width / full_width, image.height / full_height
        box = left * x, top * y, (left + width) * x, (top + height) * y
        return image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box=box)


def _defer_signals(_):
    """Workers ignore SIGINT and delay SIGTERM by 100 s, so that the main process can finish and save its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(100))  # also if it comes twice, as from torchrun
