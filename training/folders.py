"""Find the images of a folder: splits (train/, test/), class folders in them, and files, also in subfolders."""

import os
import unicodedata
from collections import defaultdict
from pathlib import Path

from images import EXTENSIONS
from training.distributed import UserError, print0
from weights import list_names

SPLITS = ("train", "test", "val", "valid")
SPLIT_LIKE = {*SPLITS, "training", "testing", "validation"}  # in lower case
HIDDEN = (".", "__MACOSX", "@eaDir")  # beginnings of names; the last two hold copies of images on macOS and Synology


def has_images(root: Path) -> bool:
    """Whether a folder contains a split, or at least two folders with images (also in subfolders of a few levels)."""

    def is_class(folder: Path) -> bool:
        files = (file for depth in range(5) for file in folder.glob("*/" * depth + "*"))
        return any(file.suffix.lower() in EXTENSIONS for file in files)

    has_split = any(os.path.isdir(root / name) for name in SPLITS)
    return has_split or sum(is_class(folder) for folder in root.glob("*/") if not folder.name.startswith(HIDDEN)) >= 2


def find_split(config, split: str, eval_splits: tuple[str, ...]) -> Path:
    """The folder of the "train" or the "test" images. Raises UserError, saying what to do, if it is missing."""
    root = Path(config.data_dir)
    names = ("train",) if split == "train" else eval_splits
    found = [name for name in SPLITS if os.path.isdir(root / name)]
    if matching := [name for name in names if name in found]:
        return root / matching[0]
    if not has_images(root):
        if nested := next(root.glob("*/train/"), None):
            raise UserError(f"{root} contains no train/, but {nested.parent} does: use --data-dir {nested.parent}")
        is_readable = os.access(root, os.R_OK | os.X_OK)
        absent = "contains neither train/CLASS/* nor two class folders with images (convert HEIC to JPEG)"
        problem = absent if is_readable else "does not exist, or may not be read"
        advice = "if you have no images, try --dataset patterns, or train_cifar.py with --dataset cifar10"
        raise UserError(f"{root} {problem}; {advice}")
    others = [file.name for file in root.iterdir() if file.is_dir() and file.name not in SPLITS]
    if split_like := [name for name in others if name.lower() in SPLIT_LIKE]:
        raise UserError(f"rename {list_names(split_like)} in {root}: splits are named {', '.join(SPLITS)}")
    if not found and (config.val_fraction or (config.eval and split == "test")):
        return root
    content = ", ".join(f"{name}/" for name in found) or "class folders"
    advice = "" if found and split == "train" else "; to evaluate on a part of each class, add --val-fraction 0.1"
    missing = " or ".join(f"{name}/" for name in names)
    raise UserError(f"{root} contains {content}, but no {missing}{advice}")


def find_images(folder: Path) -> dict[str, list[Path]]:
    """The image files of every class folder and its subfolders, both sorted by name.

    A note says what was skipped. Class names are in Unicode normal form NFC. Raises UserError if a folder contains no
    images, and OSError if it cannot be read.
    """
    tree, skipped = defaultdict(list), defaultdict(list)
    real = Path(os.path.realpath(folder))
    for entry in _entries(folder):
        if entry.is_dir():
            name = unicodedata.normalize("NFC", entry.name)  # macOS has NFD
            tree[name] += find_files(entry.path, {str(real), *map(str, real.parents)}, skipped)
        else:
            skipped["outside of class folders"].append(entry.path)
    if skipped:
        relative = {reason: [os.path.relpath(path, folder) for path in paths] for reason, paths in skipped.items()}
        print0(f"note: skipped in {folder}: {list_skipped(relative)}")
    if not tree:
        raise UserError(f"{folder} contains no class folders; put the images into {folder}/CLASS/")
    for name, files in tree.items():
        if not files:
            raise UserError(f"{folder / name} contains no images; add some (convert HEIC to JPEG), or remove it")
    return {name: [Path(file) for file in sorted(tree[name])] for name in sorted(tree)}


def find_files(folder: str, visited: set[str], skipped: dict[str, list[str]]) -> list[str]:
    """The image files of a folder and its subfolders. Raises OSError.

    Adds the real paths of folders to `visited`, and to `skipped`, by reason, the paths of all other files.
    """
    real = os.path.realpath(folder)
    if real in visited:  # otherwise, a link to a parent folder would never end
        skipped["links to folders that are already included"].append(folder)
        return []
    visited.add(real)
    files = []
    for entry in _entries(folder):
        if entry.is_symlink() and not os.path.exists(entry.path):
            skipped["broken links"].append(entry.path)
        elif entry.is_dir():
            files += find_files(entry.path, visited, skipped)
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            files.append(entry.path)
        else:
            skipped["of an unsupported type"].append(entry.path)
    return files


def list_skipped(skipped: dict[str, list[str]]) -> str:
    """How many files were skipped for every reason, with the first few."""
    return "; ".join(f"{len(paths)} {reason} ({list_names(paths)})" for reason, paths in sorted(skipped.items()))


def _entries(folder: str | Path) -> list[os.DirEntry]:
    """The entries of a folder, without hidden ones. Faster than Path.iterdir for 1.3 million files."""
    return [entry for entry in os.scandir(folder) if not entry.name.startswith(HIDDEN)]
