"""Speed of loading full-size images for training, on one core: our worker against torchvision's usual transforms.

    python -m benchmarks.data_loading /data/imagenet     a folder with train/CLASS/*.JPEG; 128 of them, one minute

In our loader, a worker decodes, crops, and applies RandAugment; the device flips, normalizes, and erases whole batches.
torchvision's transforms all run in the worker, image by image. Writes results/benchmarks/data_loading.{json,md}.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import v2

from benchmarks.timing import benchmark_parser, time_interleaved, write_results
from images import MEAN, STD, normalize
from training.augment import random_crop, random_erasing, random_hflip
from training.checkpoint import provenance
from training.distributed import UserError
from training.folders import find_images
from training.image_folder import ImageFolderDataset

SIZE = 224  # pixels
IMAGES = 128  # of the folder


def torchvision_loader(magnitude: int) -> Callable[[Path], torch.Tensor]:
    """Loads a file with the usual transforms, with RandAugment of this magnitude (0: off)."""
    transforms = v2.Compose([
        v2.RandomResizedCrop(SIZE, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        *([v2.RandomApply([v2.RandAugment(1, magnitude, num_magnitude_bins=11)])] * 2 if magnitude else []),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ])  # fmt: skip
    return lambda file: transforms(Image.open(file).convert("RGB"))


def call_on_each(function: Callable, items: Iterable):
    for item in items:
        function(item)


def main():
    parser = benchmark_parser("data_loading", __doc__)
    parser.add_argument("data_dir", type=Path, help="folder with train/CLASS/*")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    try:
        files = [file for files in find_images(args.data_dir / "train").values() for file in files]
        files = files[:: max(1, len(files) // IMAGES)][:IMAGES]  # of all classes
    except (UserError, OSError) as error:
        parser.error(str(error))

    header = provenance(torch.device("cpu")) | {"images": len(files), "size": SIZE}
    labels, steps = torch.zeros(len(files), dtype=torch.long), {}
    for name, magnitude in (("", 9), (", without RandAugment", 0)):
        ours = ImageFolderDataset(files, labels, SIZE, magnitude)
        steps[f"torchvision, in the worker{name}"] = torchvision_loader(magnitude), files
        steps[f"ours, in the worker{name}"] = ours.read, files
    batches = torch.stack([ours.read(file) for file in files]).split(32)
    cifar_batches = torch.randint(0, 256, (len(files), 3, 32, 32), dtype=torch.uint8).split(64)
    steps |= {
        "ours, on the device (here the same core), 32 images: flip, normalize, erase": (
            lambda images: random_erasing(normalize(random_hflip(images)), 0.25), batches),
        "CIFAR, on the device (here the same core), 64 images: crop, flip, normalize": (
            lambda images: normalize(random_hflip(random_crop(images, 4))), cifar_batches),
    }  # fmt: skip
    seconds = time_interleaved({name: partial(call_on_each, *step) for name, step in steps.items()}, repetitions=5)
    seconds = {name: duration / len(files) for name, duration in seconds.items()}  # per image
    lines = ["| one thread | ms per image | images/s |", "|---|---|---|"]
    lines += [f"| {name} | {1000 * duration:.3f} | {1 / duration:.0f} |" for name, duration in seconds.items()]
    ratios = [
        seconds[f"torchvision, in the worker{name}"] / seconds[f"ours, in the worker{name}"]
        for name in ("", ", without RandAugment")
    ]
    lines.append("\nOur worker is {:.2f} times as fast as one with torchvision's transforms ({:.2f} times without "
                 "RandAugment), and leaves flip and normalization to the device.\n".format(*ratios))  # fmt: skip
    write_results(args.out, "data_loading", header, "\n".join(lines), {"seconds": seconds})


if __name__ == "__main__":
    main()
