"""Classify image files with a trained model, and plot what its heads attend to.

    python predict.py runs/cifar cat.jpg dog.jpg          the three most likely classes of each image
    python predict.py convit_tiny photos/ --csv           a released model; all images of a folder, as CSV
    python predict.py demo/cifar10 cat.jpg --attention heads.png --layer 5

An unreadable file is named, and the others are classified.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import torch

from analysis import plot_attention
from convit_min import ConViT
from images import preprocess
from training.config import int_at_least
from weights import open_model


@torch.inference_mode()
def predict(model: ConViT, image, top: int = 3) -> list[tuple[str, float]]:
    """The most likely classes of an image and their probabilities, the best first.

    `model` comes from `open_model`; `image` is a path, the bytes of a file, a PIL image, or an array (H W 3).
    Raises ValueError if the image is unreadable.
    """
    logits = model(preprocess(model, image))[0]
    probabilities, indices = logits.softmax(dim=0).topk(min(top, len(logits)))
    return [(model.classes[index], p) for index, p in zip(indices.tolist(), probabilities.tolist(), strict=True)]


def find_files(paths: list[Path]) -> list[Path]:
    """The given files, and all files in the given folders and their subfolders, except hidden ones."""
    files = []
    for path in paths:
        found = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        files += [file for file in found if not file.name.startswith(".")]
    return files


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="run folder, weights file, or name of a released model")
    parser.add_argument("images", nargs="+", type=Path, help="image files, or folders of them")
    parser.add_argument("--top", type=int_at_least(1), default=3, help="classes per image (%(default)s)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON record per image")
    output.add_argument("--csv", action="store_true", help="one CSV row per image")
    parser.add_argument("--attention", type=Path, metavar="FILE", help="plot the heads of --layer for the first image")
    parser.add_argument("--layer", type=int, default=1, help="layer to plot, from 1 (%(default)s)")
    args = parser.parse_args()
    try:
        model, files, status = open_model(args.model), find_files(args.images), 0
        if not files:
            raise ValueError(f"no images in {', '.join(map(str, args.images))}")
        if args.attention:
            plot_attention(model, files[0], args.layer).savefig(args.attention, dpi=120)
    except (ValueError, OSError) as error:
        sys.exit(f"predict.py: {error}")
    rows = csv.writer(sys.stdout)
    for file in files:
        try:
            predictions = predict(model, file, args.top)
        except ValueError as error:
            print(f"predict.py: {error}", file=sys.stderr)
            status = 1
            continue
        if args.json:
            print(json.dumps({"file": str(file), "classes": predictions}))
        elif args.csv:
            rows.writerow([file, *(value for prediction in predictions for value in prediction)])
        else:
            print(f"{file}: {', '.join(f'{name} {p:.1%}' for name, p in predictions)}")
    sys.exit(status)


if __name__ == "__main__":
    main()
