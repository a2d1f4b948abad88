"""Read and load weights: our own files, the authors', timm's, and DeiT's share one format."""

import math
import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from convit_min import ConViT, ConViTConfig, resize_pos_embed

RELEASED = ("convit_tiny", "convit_small", "convit_base")
RELEASED_URL = "https://dl.fbaipublicfiles.com/convit/{}.pth"
MAX_LISTED = 5  # names in an error


def load_weights(model: ConViT, source: str | Path, new: Collection[str] = ()):
    """Load weights from a file, a URL, or the name of a released model.

    pos_embed is resized for another image size. The model keeps its own head, with a warning, if the number of classes
    differs. Parameters named in `new` (as in ("relative_bias",), wherever they occur) may be missing from the file and
    then keep their initial values.

    Raises FileNotFoundError if there is no such file, and ValueError if it is damaged, is not a PyTorch checkpoint, or
    does not match the model. The model is then unchanged. No code in the file is executed.
    """
    state, grid = read_weights(str(source))
    expected = model.state_dict()
    _adapt_pos_embed(state, grid, model)

    head = {key: value for key, value in expected.items() if key.startswith("head.")}
    file_head = {key for key in state if key.startswith("head.")}
    if file_head != head.keys() or any(state[key].shape != head[key].shape for key in head):
        warnings.warn(f"{source} has another number of classes: the model keeps its own head", stacklevel=2)
        state = {key: value for key, value in state.items() if key not in file_head} | head

    missing = expected.keys() - state.keys()
    kept = {key for key in missing if set(key.split(".")) & set(new)}
    mismatches = {
        "missing": missing - kept,
        "unexpected": state.keys() - expected.keys(),
        "of another shape": {key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape},
    }
    problems = [f"{problem}: {_list_names(keys)}" for problem, keys in mismatches.items() if keys]
    if problems:
        raise ValueError(f"{source} does not match this model: {'; '.join(problems)}")
    model.load_state_dict(state | {key: expected[key] for key in kept})


def _adapt_pos_embed(state: dict[str, Tensor], grid: tuple[int, int] | None, model: ConViT):
    """Resize pos_embed in `state` to the model's grid; fold DeiT's row for the class token into cls_token."""
    pos_embed, cls_token = state.get("pos_embed"), state.get("cls_token")
    if pos_embed is None or pos_embed.ndim != 3:
        return
    num_rows = pos_embed.shape[1]
    if grid is None and num_rows == math.prod(model.config.grid):
        grid = model.config.grid
    if grid is None:  # files of others do not record the grid; theirs are square
        grid = (math.isqrt(num_rows),) * 2
        if cls_token is not None and num_rows == math.prod(grid) + 1:  # DeiT
            state["cls_token"], pos_embed = cls_token + pos_embed[:, :1], pos_embed[:, 1:]
    if pos_embed.shape[1] == math.prod(grid):
        pos_embed = resize_pos_embed(pos_embed, grid, model.config.grid)
    state["pos_embed"] = pos_embed


def read_weights(source: str) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """The tensors of a file, URL, or released model by name, and the patch grid if the file records it.

    Raises FileNotFoundError or ValueError like `load_weights`.
    """
    url = RELEASED_URL.format(source) if source in RELEASED else source
    try:
        if url.startswith(("https://", "http://")):
            file_name = url.partition("://")[2].replace("/", "_")  # torch.hub would cache by the last part alone
            record = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True, file_name=file_name)
        else:
            record = torch.load(url, map_location="cpu", weights_only=True)
        grid = ConViTConfig(**record["model_config"]).grid if "model_config" in record else None  # our own files
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {source}, and no released model of that name") from None
    except Exception as error:  # unpickling a damaged file raises nearly any exception
        raise ValueError(f"{source} cannot be downloaded, is damaged, or is not a PyTorch checkpoint") from error
    state = record.get("model", record) if isinstance(record, dict) else None
    if not isinstance(state, dict) or not any(map(torch.is_tensor, state.values())):
        raise ValueError(f"{source} contains no weights")
    return {str(name): value for name, value in state.items() if torch.is_tensor(value)}, grid


def open_snapshot(file: Path) -> tuple[ConViT, dict]:
    """A model in eval mode from a weights file of a run (best.pt, snapshots/*.pt), and its epoch and classes.

    Raises ValueError if the file is not such a file.
    """
    try:
        record = torch.load(file, map_location="cpu", weights_only=True)
        model = ConViT(ConViTConfig(**record["model_config"])).eval()
        model.load_state_dict(record["model"])
        return model, {"epoch": int(record["epoch"]), "classes": [str(name) for name in record["classes"]]}
    except Exception as error:  # unpickling a damaged file raises nearly any exception
        raise ValueError(f"{file} is not a snapshot of a run, or is damaged") from error


def _list_names(names: Collection[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(sorted(names)[:MAX_LISTED]) + more
