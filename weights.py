"""Load weights: our own files, and those of the authors, timm, and DeiT, which use the same parameter names."""

import argparse
import math
import re
import unicodedata
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path, PosixPath
from typing import NamedTuple

import torch
from torch import Tensor

from convit_min import MODELS, ConViT, ConViTConfig, Grid, resize_pos_embed
from images import STD, default_crop_pct

RELEASED = ("convit_tiny", "convit_small", "convit_base")
RELEASED_URL = "https://dl.fbaipublicfiles.com/convit/{}.pth"
STATE_DICT_KEYS = ("ema", "state_dict_ema", "model", "state_dict", "model_ema")  # in order of preference
PATCH_EMBED = "patch_embed.proj.weight"  # every ConViT and ViT has it; what precedes it in a file is a prefix
STRUCTURE = ("patch_size", "in_chans", "dim", "depth", "num_heads", "gpsa_layers", "mlp_ratio", "qkv_bias", "pool")
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

    The model has the additional attributes `name`, `classes` (names; `has_class_names` if the file records them),
    `epoch` (0 if unknown), and `crop_pct` (the fraction of an image's sides to predict from). Its input is RGB, even if
    the weights are those of a grayscale model.
    Raises FileNotFoundError or ValueError like `load_weights`.
    """
    weights = read_weights(str(source))
    name, config = (Path(source).stem, weights.config) if weights.config else infer_model(weights.state)
    if config is None:
        missing = [name for name in (PATCH_EMBED, "pos_embed", "head.weight") if name not in weights.state]
        reason = f"has no {missing[0]}" if missing else "does not match any model in convit_min.MODELS"
        is_vit = missing in ([], ["head.weight"])
        build = "build its model with create_model(...), and call load_weights"
        foreign = "it is not a ConViT, or a ViT with timm's parameter names"
        raise ValueError(f"{source} {reason}: {build if is_vit else foreign}")
    if config.in_chans not in (1, 3):
        raise ValueError(f"{source} is for images of {config.in_chans} channels: only grayscale and RGB can be opened")
    if config.in_chans == 1:  # images are RGB: open an equivalent model of the mean of their channels
        weights.state[PATCH_EMBED] = weights.state[PATCH_EMBED] * (torch.tensor(STD) / sum(STD)).view(3, 1, 1)
        config = replace(config, in_chans=3)
    model = ConViT(config).eval()
    _load(model, weights, str(source))
    model.name, model.epoch, model.has_class_names = name, weights.epoch, bool(weights.classes)
    return model


def load_weights(model: ConViT, source: str | Path, new: Collection[str] = (), classes: Collection[str] = ()):
    """Load weights from a run folder (best.pt, or else the last snapshot), a file, a URL, or a released model's name.

    pos_embed is resized for a different image size. If the number of classes differs, or their names differ from
    `classes`, the classifier is not loaded, and a warning says so. Parameters named in `new`, as in ("relative_bias",),
    may be missing from the file, and then keep their initial values. `model.classes` and `model.crop_pct` are set as by
    `open_model`.

    Raises FileNotFoundError if there is no such file, and ValueError if it is damaged, is not a PyTorch checkpoint, or
    does not match the model. The model is then unchanged. No code in the file is executed.
    """
    _load(model, read_weights(str(source)), str(source), new, classes)


def read_weights(source: str) -> Weights:
    """The content of a file, URL, or released model. Raises FileNotFoundError or ValueError like `load_weights`."""
    path = RELEASED_URL.format(source) if source in RELEASED else source
    is_url = path.startswith(("https://", "http://"))
    if Path(path).is_dir():
        files = [*Path(path).glob("best.pt")] or snapshot_files(path)
        if not files:
            raise FileNotFoundError(f"{source} contains neither best.pt nor snapshots/")
        path = str(files[-1])
    try:
        path = download(path) if is_url else path
        if path.partition("?")[0].endswith(".safetensors"):  # a URL may have parameters
            from safetensors.torch import load_file  # an optional dependency

            record = load_file(path)
        else:
            # in the authors' training checkpoints; Python 3.13, and only it, writes pathlib._local
            paths = [(PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")]
            with torch.serialization.safe_globals([argparse.Namespace, *paths]):
                record = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {source}, and no released model of that name") from None
    except ImportError as error:
        raise ValueError(f"{source} needs a package: pip install safetensors") from error
    except OSError as error:
        problem = f"downloaded ({error}): pass a local file" if is_url else f"read: {error.strerror or error}"
        raise ValueError(f"{source} cannot be {problem}") from error
    except Exception as error:  # unpickling a damaged file raises nearly any exception
        if "TorchScript" in str(error):
            raise ValueError(f"{source} is a TorchScript file: save the state_dict of the model") from error
        if found := re.search(r"nsupported (?:global: )?GLOBAL (\S+)", str(error)):  # by weights_only
            problem = f"contains {found[1]}, which is not a tensor"
            raise ValueError(f"{source} {problem}: save only the state_dict") from error
        if is_url:
            Path(path).unlink(missing_ok=True)  # so that the next call downloads it again
        raise ValueError(f"{source} is damaged, or is not a PyTorch checkpoint") from error

    record = record if isinstance(record, dict) else {}
    released = MODELS[source] if source in RELEASED else None
    try:
        config = ConViTConfig(**record["model_config"]) if "model_config" in record else released
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} was written by another version of convit_min.py ({error})") from error
    candidates = [record[key] for key in STATE_DICT_KEYS if isinstance(record.get(key), dict)] + [record]
    nested = next((values for values in candidates if any(map(torch.is_tensor, values.values()))), {})
    tensors = {str(name): value for name, value in nested.items() if torch.is_tensor(value)}
    if not tensors:
        raise ValueError(f"{source} contains no weights, neither directly nor under {', '.join(STATE_DICT_KEYS)}")
    # DataParallel, torch.compile, Lightning, and others prefix all names of the model, and may add other tensors
    embeddings = [name for name in tensors if name.endswith(PATCH_EMBED)]
    if len(embeddings) > 1:
        raise ValueError(f"{source} contains several models ({list_names(embeddings)}): save the state_dict of one")
    prefix = embeddings[0].removesuffix(PATCH_EMBED) if embeddings else ""
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    classes = [unicodedata.normalize("NFC", str(name)) for name in record.get("classes", [])] if config else []
    epoch = record["train_state"].get("epoch") if config and "train_state" in record else record.get("epoch")
    return Weights(state, config, classes, epoch if isinstance(epoch, int) else 0, record.get("crop_pct"))


def download(url: str) -> str:
    """The path of a file from the web, in PyTorch's cache. Raises OSError."""
    file = Path(torch.hub.get_dir(), "checkpoints", url.partition("://")[2].replace("/", "_"))
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file))
    return str(file)


def snapshot_files(run_dir: str | Path) -> list[Path]:
    """Snapshot files of a run folder, earliest first."""
    return sorted(Path(run_dir).glob("snapshots/epoch_*.pt"), key=lambda file: (len(file.name), file.name))


def infer_model(state: dict[str, Tensor]) -> tuple[str | None, ConViTConfig | None]:
    """The name of the model in MODELS that has weights of these shapes, and its config for their classes and grid."""
    try:
        dim, in_chans, patch_size, _ = state[PATCH_EMBED].shape
        num_classes, side = state["head.weight"].shape[0], math.isqrt(state["pos_embed"].shape[1])
    except (KeyError, ValueError, IndexError):
        return None, None
    depth, pool = sum(name.endswith("norm1.weight") for name in state), "token" if "cls_token" in state else "mean"
    heads = [value.numel() for name, value in state.items() if name.endswith("gating_param")]  # by GPSA layer
    for name, config in MODELS.items():
        shapes = config.dim, config.patch_size, config.depth, [config.num_heads] * config.gpsa_layers
        if (dim, patch_size, depth, heads) == shapes:
            size = side * patch_size
            return name, replace(config, img_size=size, in_chans=in_chans, num_classes=num_classes, pool=pool)
    return None, None


def class_names(num_classes: int) -> list[str]:
    """ImageNet's names for 1000 classes, else numbers."""
    if num_classes != 1000:
        return [f"class {index}" for index in range(num_classes)]
    from torchvision.models import ResNet18_Weights  # slow to import

    return ResNet18_Weights.DEFAULT.meta["categories"]  # in label order


def _load(model: ConViT, weights: Weights, source: str, new: Collection[str] = (), classes: Collection[str] = ()):
    if classes and len(classes) != model.config.num_classes:
        raise ValueError(f"the model has {model.config.num_classes} classes, not {len(classes)}")
    state, expected, new = weights.state, model.state_dict(), {new} if isinstance(new, str) else {*new}
    _adapt_pos_embed(state, weights.config.grid if weights.config else None, model)
    num_classes = [tensors.get("head.weight", torch.tensor(0)).shape[:1] for tensors in (state, expected)]
    is_renamed = classes and weights.classes and list(classes) != weights.classes
    is_new_head = is_renamed or num_classes[0] != num_classes[1]
    if is_new_head:
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        new.add("head")
    state = {key: value for key, value in expected.items() if {key, *key.split(".")} & new} | state

    mismatches = {
        "missing": expected.keys() - state.keys(),
        "unexpected": state.keys() - expected.keys(),
        "with a different shape": {key for key in state if key in expected and state[key].shape != expected[key].shape},
    }
    mismatches = {problem: keys for problem, keys in mismatches.items() if keys}
    problems = [f"{problem}: {list_names(keys, MAX_LISTED // len(mismatches))}" for problem, keys in mismatches.items()]
    num_heads = (weights.config or model.config).num_heads  # without GPSA, no shape depends on it
    if problems or num_heads != model.config.num_heads:
        name, config = infer_model(weights.state)
        found, wanted = vars(weights.config or config or model.config), vars(model.config)
        facts = [f"it is a {name}"] if name else []
        facts += [f"it has {key}={found[key]}, not {wanted[key]}" for key in STRUCTURE if found[key] != wanted[key]]
        actual = f" ({', '.join(facts)})" if facts else ""
        raise ValueError("; ".join([f"{source} does not match this model{actual}", *problems]))
    model.load_state_dict(state)
    if is_new_head and num_classes[1]:  # else, the model has no classifier
        warnings.warn(f"{source} has other classes or no classifier: its classifier was not loaded", stacklevel=3)
    elif classes and not weights.classes:
        warnings.warn(f"{source} has no class names: its classifier was loaded, classes match by order", stacklevel=3)
    known = list(classes) or ([] if is_new_head else weights.classes)
    model.classes = known or class_names(model.config.num_classes)
    model.crop_pct = weights.crop_pct or default_crop_pct(*model.config.image_shape)


def _adapt_pos_embed(state: dict[str, Tensor], grid: Grid | None, model: ConViT):
    """Resize pos_embed in `state` to the model's grid; fold DeiT's row for the class token into cls_token."""
    pos_embed, cls_token = state.get("pos_embed"), state.get("cls_token")
    if pos_embed is None or pos_embed.ndim != 3:
        return
    num_rows = pos_embed.shape[1]
    if grid is None:  # third-party files do not record it: the model's if the number of rows matches, else a square
        is_same = num_rows == math.prod(model.config.grid)
        grid = model.config.grid if is_same else (math.isqrt(num_rows), math.isqrt(num_rows))
    if cls_token is not None and num_rows == math.prod(grid) + 1:  # DeiT
        state["cls_token"], pos_embed = cls_token + pos_embed[:, :1], pos_embed[:, 1:]
    if pos_embed.shape[1] == math.prod(grid):
        state["pos_embed"] = resize_pos_embed(pos_embed, grid, model.config.grid)


def list_names(names: Collection[str], limit: int = MAX_LISTED) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(sorted(names)[:limit]) + more
