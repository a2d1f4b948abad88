"""Speed of loading full-size images for training, on one core: our loader against torchvision's usual transforms.

    python -m benchmarks.data_loading /data/imagenet     a folder with train/CLASS/*.JPEG; one minute

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
from training.image_folder import ImageFolderDataset, decode_crop

SIZE = 224  # pixels
TORCHVISION = v2.Compose([
    v2.RandomResizedCrop(SIZE, interpolation=v2.InterpolationMode.BICUBIC),
    v2.RandomHorizontalFlip(),
    v2.RandAugment(2, 9, num_magnitude_bins=11),
    v2.PILToTensor(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(MEAN, STD),
])  # fmt: skip


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
    except UserError as error:
        parser.error(str(error))

    header = provenance(torch.device("cpu")) | {"images": len(files), "size": SIZE}
    labels = torch.zeros(len(files), dtype=torch.long)
    ours, no_randaugment = (ImageFolderDataset(files, labels, SIZE, magnitude) for magnitude in (9, 0))
    batches = torch.stack([no_randaugment.read(file) for file in files]).split(32)
    cifar_batches = torch.randint(0, 256, (len(files), 3, 32, 32), dtype=torch.uint8).split(64)
    steps = {
        "torchvision": (lambda file: TORCHVISION(Image.open(file).convert("RGB")), files),
        "ours": (ours.read, files),
        "read": (Path.read_bytes, files),
        "decode": (lambda file: decode_crop(file, SIZE), files),
        "no RandAugment": (no_randaugment.read, files),
        "device": (lambda images: random_erasing(normalize(random_hflip(images)), 0.25), batches),
        "CIFAR": (lambda images: normalize(random_hflip(random_crop(images, 4))), cifar_batches),
    }
    seconds = time_interleaved({name: partial(call_on_each, *step) for name, step in steps.items()}, repetitions=5)
    seconds = {name: duration / len(files) for name, duration in seconds.items()}  # per image
    rows = {
        "torchvision's transforms, in the worker": seconds["torchvision"],
        "ours, in the worker": seconds["ours"],
        "- read the file": seconds["read"],
        "- decode, at the JPEG scale that the crop needs": seconds["decode"] - seconds["read"],
        "- crop and resize": seconds["no RandAugment"] - seconds["decode"],
        "- RandAugment": seconds["ours"] - seconds["no RandAugment"],
        "ours, in the worker, without RandAugment": seconds["no RandAugment"],
        "ours, on the device (here the same core), 32 images: flip, normalize, erase": seconds["device"],
        "CIFAR, on the device (here the same core), 64 images: crop, flip, normalize": seconds["CIFAR"],
    }
    lines = ["| one thread | ms per image | images/s |", "|---|---|---|"]
    lines += [f"| {name} | {1000 * duration:.3f} | {1 / duration:.0f} |" for name, duration in rows.items()]
    speedups = [seconds["torchvision"] / seconds[name] for name in ("ours", "no RandAugment")]
    lines.append("\nIn the worker, our loader is {:.2f} times as fast as torchvision's transforms, and {:.2f} times "
                 "without RandAugment.\n".format(*speedups))  # fmt: skip
    write_results(args.out, "data_loading", header, "\n".join(lines), {"seconds": rows})


if __name__ == "__main__":
    main()
