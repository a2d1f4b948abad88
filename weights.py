"""Read weights: our own files, the authors', timm's, and DeiT's share one format."""

import argparse
import math
import unicodedata
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from convit_min import MODELS, ConViT, ConViTConfig, Grid, resize_pos_embed
from images import default_crop_pct

RELEASED = ("convit_tiny", "convit_small", "convit_base")
RELEASED_URL = "https://dl.fbaipublicfiles.com/convit/{}.pth"
STATE_DICT_KEYS = ("ema", "state_dict_ema", "model", "state_dict", "model_ema")  # the first that a file has
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, and Lightning
MAX_LISTED = 5  # names in an error


class Weights(NamedTuple):
    """The content of a weights file; only our own files record more than the tensors."""

    state: dict[str, Tensor]
    config: ConViTConfig | None
    classes: list[str]
    epoch: int
    crop_pct: float | None  # fraction of an image's sides that the model was evaluated on


def open_model(source: str | Path) -> ConViT:
    """A model in eval mode from a run folder, a weights file, a URL, or the name of a released model.

    The model has the additional attributes `name`, `classes` (names), `epoch` (0 if unknown), and `crop_pct` (the
    fraction of an image's sides to predict from).
    Raises FileNotFoundError or ValueError like `load_weights`.
    """
    weights = read_weights(str(source))
    name, config = infer_model(weights.state) if weights.config is None else (Path(source).stem, weights.config)
    if config is None:
        raise ValueError(f"{source} does not match any model in convit_min.MODELS")
    model = ConViT(config).eval()
    _load(model, weights, str(source))
    model.name, model.epoch = name, weights.epoch
    model.classes = weights.classes or class_names(config.num_classes)
    model.crop_pct = weights.crop_pct or default_crop_pct(*config.image_shape)
    return model


def load_weights(model: ConViT, source: str | Path, new: Collection[str] = (), classes: Collection[str] | None = None):
    """Load weights from a run folder (best.pt, or else the last snapshot), a file, a URL, or a released model's name.

    pos_embed is resized for a different image size. If the number of classes differs, or their names from `classes`,
    the classifier is not loaded, and a warning says so. Parameters named in `new`, as in ("relative_bias",), may be
    missing from the file, and then keep their initial values.

    Raises FileNotFoundError if there is no such file, and ValueError if it is damaged, is not a PyTorch checkpoint, or
    does not match the model. The model is then unchanged. No code in the file is executed.
    """
    _load(model, read_weights(str(source)), str(source), new, classes)


def read_weights(source: str) -> Weights:
    """The content of a file, URL, or released model. Raises FileNotFoundError or ValueError like `load_weights`."""
    url = RELEASED_URL.format(source) if source in RELEASED else source
    try:
        if url.endswith(".safetensors") and not url.startswith("http"):
            from safetensors.torch import load_file  # an optional dependency

            record = load_file(url)
        elif url.startswith(("https://", "http://")):
            file_name = url.partition("://")[2].replace("/", "_")  # torch.hub would cache by the last part alone
            record = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, file_name=file_name)
        else:
            if Path(url).is_dir():
                url = str(_find_weights(Path(url)))
            with torch.serialization.safe_globals([argparse.Namespace]):  # in the authors' training checkpoints
                record = torch.load(url, map_location="cpu", weights_only=True)
        config = ConViTConfig(**record["model_config"]) if "model_config" in record else None
    except FileNotFoundError as error:
        missing = f"there is no file {source}, and no released model of that name"
        raise FileNotFoundError(str(error) if Path(source).is_dir() else missing) from None
    except ImportError as error:
        raise ValueError(f"{source} needs a package: pip install safetensors") from error
    except Exception as error:  # unpickling a damaged file raises nearly any exception
        if url.startswith("http") and isinstance(error, OSError):
            raise ValueError(f"{source} cannot be downloaded ({error}): pass a local file") from error
        if "Unsupported global" in str(error):  # by weights_only
            raise ValueError(f"{source} contains a pickled model or other objects: save its state_dict") from error
        raise ValueError(f"{source} is damaged, or is not a PyTorch checkpoint") from error

    record = record if isinstance(record, dict) else {}
    nested = next((record[key] for key in STATE_DICT_KEYS if key in record), record)
    items = nested.items() if isinstance(nested, dict) else []
    state = {_strip_prefixes(str(name)): value for name, value in items if torch.is_tensor(value)}
    state.pop("n_averaged", None)  # of AveragedModel
    if not state:
        raise ValueError(f"{source} contains no weights")
    classes = [unicodedata.normalize("NFC", str(name)) for name in record.get("classes", [])] if config else []
    epoch = record.get("epoch", record.get("train_state", {}).get("epoch"))  # the latter in last.pt
    return Weights(state, config, classes, epoch if isinstance(epoch, int) else 0, record.get("crop_pct"))


def snapshot_files(run_dir: Path) -> list[Path]:
    """Snapshot files of a run folder, earliest first."""
    return sorted(run_dir.glob("snapshots/epoch_*.pt"))


def _find_weights(run_dir: Path) -> Path:
    files = [*run_dir.glob("best.pt")] or snapshot_files(run_dir)
    if not files:
        raise FileNotFoundError(f"{run_dir} contains neither best.pt nor snapshots/")
    return files[-1]


def infer_model(state: dict[str, Tensor]) -> tuple[str | None, ConViTConfig | None]:
    """The name of the model in MODELS that has weights of these shapes, and its config for their classes and grid."""
    try:
        dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
        num_classes, side = state["head.weight"].shape[0], math.isqrt(state["pos_embed"].shape[1])
        gates = [value for name, value in state.items() if name.endswith("gating_param")]
    except (KeyError, ValueError):
        return None, None
    for name, config in MODELS.items():
        heads_match = not gates or len(gates[0]) == config.num_heads
        if (dim, patch_size, len(gates)) == (config.dim, config.patch_size, config.gpsa_layers) and heads_match:
            return name, ConViTConfig(**vars(config) | {"num_classes": num_classes, "img_size": side * patch_size})
    return None, None


def class_names(num_classes: int) -> list[str]:
    """ImageNet's names for 1000 classes, else numbers."""
    from torchvision.models import ResNet18_Weights  # slow to import

    imagenet = ResNet18_Weights.DEFAULT.meta["categories"]  # in label order
    return imagenet if num_classes == len(imagenet) else [f"class {index}" for index in range(num_classes)]


def _load(
    model: ConViT,
    weights: Weights,
    source: str,
    new: Collection[str] = (),
    classes: Collection[str] | None = None,
):
    state, expected = weights.state, model.state_dict()
    _adapt_pos_embed(state, weights.config.grid if weights.config else None, model)
    head = {key: value for key, value in expected.items() if key.startswith("head.")}
    file_head = {key for key in state if key.startswith("head.")}
    is_renamed = classes and weights.classes and list(classes) != weights.classes
    is_new = is_renamed or file_head != head.keys() or any(len(state[key]) != len(head[key]) for key in head)
    if is_new:
        state = {key: value for key, value in state.items() if key not in file_head} | head

    missing = expected.keys() - state.keys()
    kept = {key for key in missing if set(key.split(".")) & set(new)}
    mismatches = {
        "missing": missing - kept,
        "unexpected": state.keys() - expected.keys(),
        "with a different shape": {key for key in state if key in expected and state[key].shape != expected[key].shape},
    }
    problems = [f"{problem}: {list_names(keys)}" for problem, keys in mismatches.items() if keys]
    if problems:
        name, _ = infer_model(weights.state)
        actual = f" (it is a {name})" if name else ""
        raise ValueError(f"{source} does not match this model{actual}; {'; '.join(problems)}")
    model.load_state_dict(state | {key: expected[key] for key in kept})
    if is_new:
        warnings.warn(f"{source} has other classes: its classifier is not loaded", stacklevel=3)


def _adapt_pos_embed(state: dict[str, Tensor], grid: Grid | None, model: ConViT):
    """Resize pos_embed in `state` to the model's grid; fold DeiT's row for the class token into cls_token."""
    pos_embed, cls_token = state.get("pos_embed"), state.get("cls_token")
    if pos_embed is None or pos_embed.ndim != 3:
        return
    num_rows = pos_embed.shape[1]
    if grid is None and num_rows == math.prod(model.config.grid):
        grid = model.config.grid
    if grid is None:  # third-party files do not record the grid; theirs are square
        grid = (math.isqrt(num_rows),) * 2
        if cls_token is not None and num_rows == math.prod(grid) + 1:  # DeiT
            state["cls_token"], pos_embed = cls_token + pos_embed[:, :1], pos_embed[:, 1:]
    if pos_embed.shape[1] == math.prod(grid):
        pos_embed = resize_pos_embed(pos_embed, grid, model.config.grid)
    state["pos_embed"] = pos_embed


def _strip_prefixes(name: str) -> str:
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def list_names(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(sorted(names)[:MAX_LISTED]) + more
