"""How fast pictures come off the disk, on one core, for training: our way against torchvision's usual recipe.

    python benchmark_data.py data/imagenet160       a tree train/CLASS/*.JPEG of full-size pictures; a minute

Ours decodes, crops and (where asked) applies RandAugment on the worker and leaves the rest to the device, for whole
batches; the recipe does it all on the worker, picture by picture. Writes results/benchmark-data.{json,md}.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from convit_min import create_model, normalise
from training.augment import erase, flip, shift
from training.checkpoint import provenance
from training.data import list_pictures, to_tensor
from training.files import PictureFiles, decode_part, random_resized_crop

SIZE = 224


def median_seconds(steps: dict, items: Sequence, repetitions: int = 5) -> dict[str, float]:
    """Seconds that each step takes for one item, the steps taking turns; median over repetitions."""
    taken = {name: [] for name in steps}
    for _ in range(repetitions):
        for name, step in steps.items():
            start = time.perf_counter()
            for item in items:
                step(item)
            taken[name].append((time.perf_counter() - start) / len(items))
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", type=Path, help="a tree train/CLASS/*")
    parser.add_argument("--out", type=Path, default=Path("results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    files = [file for files in list_pictures(args.data_dir / "train").values() for file in files]
    full, plain = (PictureFiles(files, torch.zeros(len(files)), SIZE, magnitude) for magnitude in (9, 0))

    recipe = v2.Compose([
        v2.RandomResizedCrop(SIZE, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
        v2.RandAugment(2, 9, num_magnitude_bins=11),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip

    def usual(file: Path):
        with Image.open(file) as picture:
            recipe(picture.convert("RGB"))

    seconds = median_seconds(
        {
            "ours": full.read,
            "without RandAugment": plain.read,
            "usual": usual,
            "read": lambda file: file.read_bytes(),
            "read and decode": lambda file: decode_part(file, SIZE),
        },
        files,
    )
    pictures = torch.stack([to_tensor(random_resized_crop(file, SIZE)) for file in files])
    steps = {"augment": lambda batch: erase(normalise(flip(batch)), 0.25)}
    augment = median_seconds(steps, pictures.split(32))["augment"] / 32

    rows = [
        ("ours on the worker", seconds["ours"]),
        ("- read", seconds["read"]),
        ("- decode, at the scale that the crop needs", seconds["read and decode"] - seconds["read"]),
        ("- crop and resize", seconds["without RandAugment"] - seconds["read and decode"]),
        ("- RandAugment", seconds["ours"] - seconds["without RandAugment"]),
        ("ours on the worker, without RandAugment", seconds["without RandAugment"]),
        ("ours on the device (here the same core), a batch of 32: flip, normalise, erase", augment),
        ("torchvision's recipe, all on the worker", seconds["usual"]),
    ]
    header = provenance(torch.device("cpu")) | {"pictures": len(files), "pixels": SIZE}
    cifar, step = cifar_step()
    lines = [
        ", ".join(f"{key}: {value}" for key, value in header.items()),
        "",
        "| one thread | ms a picture | images/s |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {1000 * duration:.2f} | {1 / duration:.0f} |" for name, duration in rows]
    gain, plain_gain = (seconds["usual"] / seconds[name] for name in ("ours", "without RandAugment"))
    lines += ["", f"Ours is {gain:.2f} times as fast as the recipe; without RandAugment, {plain_gain:.2f} times.", ""]
    lines += [f"CIFAR, batch of 64, nano model, two threads: augmentation {1000 * cifar:.1f} ms of a training step of "
              f"{1000 * step:.0f} ms, {cifar / step:.1%}."]  # fmt: skip
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "benchmark-data.md").write_text("\n".join(lines) + "\n")
    result = {"header": header, "seconds": dict(rows), "cifar_augmentation": cifar, "cifar_training_step": step}
    (args.out / "benchmark-data.json").write_text(json.dumps(result, indent=1) + "\n")


def cifar_step() -> tuple[float, float]:
    """Seconds that augmenting a batch of CIFAR takes, and a whole training step of the nano model with it."""
    torch.set_num_threads(2)
    model = create_model("convit_cifar_nano")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, labels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8), torch.randint(0, 10, (64,))

    def augment(_) -> torch.Tensor:
        return normalise(flip(shift(images, 4)))

    def step(_):
        F.cross_entropy(model(augment(_)), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = median_seconds({"augment": augment, "step": step}, range(5), repetitions=9)
    return seconds["augment"], seconds["step"]


if __name__ == "__main__":
    main()
