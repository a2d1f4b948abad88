"""Classify image files with a trained model, and plot what its heads attend to.

    python predict.py runs/cifar cat.jpg dog.jpg          the three most likely classes of each image
    python predict.py convit_tiny photos/ --csv           a released model; all images of a folder, as CSV
    python predict.py demo/cifar10 demo/cifar10/images/cat.jpg --attention heads.png --layer 5

In folders, files of an unsupported type are skipped, with a note. Unreadable images are reported, the others are
classified, and the exit status is 1.
"""

import argparse
import csv
import json
import signal
import sys
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends imports without a traceback

import torch

from analysis import check_index, plot_attention
from convit_min import ConViT
from images import preprocess
from training.config import Parser, number
from training.folders import find_files, list_skipped
from weights import open_model


@torch.inference_mode()
def predict(model: ConViT, image, top: int = 3) -> list[tuple[str, float]]:
    """The most likely classes of an image and their probabilities, the best first.

    `model` comes from `open_model`, or is an RGB model with weights from `load_weights`; `image` is a path, the bytes
    of a file, a PIL image, or a uint8 array (H W, or H W 3). Raises ValueError if it is none of these, or unreadable,
    and for `top` below 1.
    """
    check_index("number of classes", min(top, len(model.classes)), 1, len(model.classes))
    logits = model(preprocess(model, image))[0]
    probabilities, indices = logits.float().softmax(dim=0).topk(min(top, len(logits)))
    return [(model.classes[index], p) for index, p in zip(indices.tolist(), probabilities.tolist(), strict=True)]


def list_files(paths: list[Path]) -> list[Path]:
    """The given files, and the images and broken links in the given folders and their subfolders.

    A note says what was skipped. Raises OSError if a folder cannot be read.
    """
    files, skipped = [], defaultdict(list)
    for path in paths:
        files += sorted(map(Path, find_files(str(path), set(), skipped))) if path.is_dir() else [path]
    files += map(Path, skipped.pop("broken links", []))  # opening them fails, and says why
    if skipped:
        print(f"note: skipped {list_skipped(skipped)}", file=sys.stderr)
    return files


def main():
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # keeps the results so far, removes a partial download
    sys.stdout.reconfigure(errors="surrogateescape")  # file names that are not UTF-8, byte for byte
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("model", help="run folder, weights file, or name of a released model")
    parser.add_argument("images", nargs="+", type=Path, help="image files, or folders of them")
    parser.add_argument("--top", type=number(int, 1), default=3, help="number of classes to print (default: 3)")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="one JSON record per image")
    output.add_argument("--csv", action="store_true", help="a CSV header, and one row per image")
    parser.add_argument("--attention", type=Path, metavar="FILE", help="plot the heads for the first readable image")
    parser.add_argument("--layer", type=int, default=1, help="layer to plot, from 1 (default: 1)")
    args = parser.parse_or_exit()
    try:
        model, files, status = open_model(args.model), list_files(args.images), 0
        if not files:
            raise ValueError(f"no images in {', '.join(map(str, args.images))}")
    except (ValueError, OSError) as error:
        sys.exit(f"predict.py: {error}")
    if hasattr(signal, "SIGPIPE"):  # Windows lacks it
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when `| head` closes the pipe
    rows = csv.writer(sys.stdout)
    if args.csv:
        ranks = range(1, min(args.top, len(model.classes)) + 1)
        rows.writerow(["file", *(f"{name} {rank}" for rank in ranks for name in ("class", "probability"))])
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
            rows.writerow([file, *(value for name, p in predictions for value in (name, f"{p:.4f}"))])
        else:
            print(f"{file}: {', '.join(f'{name} {p:.1%}' for name, p in predictions)}")
        if args.attention:
            try:
                plot_attention(model, file, args.layer).savefig(args.attention, dpi=120)
            except (ValueError, OSError) as error:
                sys.exit(f"predict.py: {error}")
            args.attention = None  # only the first
    sys.exit(status)


if __name__ == "__main__":
    main()
