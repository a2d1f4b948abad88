"""What the heads of a ConViT do, as tensors and plots: gate, attention center, locality strength, and non-locality."""

import json
import math
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from convit_min import ConViT
from images import default_crop_pct, load_crop, normalize

MAP_ELEMENTS = 2**20  # of one head that `head_statistics` holds in memory at once


class HeadStatistics(NamedTuple):
    """Statistics of every layer and head. In self-attention layers, all but `non_locality` are NaN."""

    gate: Tensor  # l h: sigmoid(gating_param); 1 is position only, 0 content only
    center: Tensor  # l h 2: attention center (dx, dy) in patches, right and down are positive; NaN if strength is 0
    strength: Tensor  # l h: locality strength alpha (width: 1 / sqrt(2 alpha)); if negative, the head avoids its center
    non_locality: Tensor  # l h: mean attention distance in patches


@torch.no_grad()
def head_statistics(model: ConViT, images: Tensor) -> HeadStatistics:
    """Statistics of all heads. Non-locality is measured on normalized images (b c H W), on each layer's own input."""
    was_training = model.training
    model.eval()
    grid = tuple(side // model.config.patch_size for side in images.shape[-2:])
    batch_size = max(1, min(16, MAP_ELEMENTS // math.prod(grid) ** 2))
    total = 0
    for batch in images.split(batch_size):
        _, attention = model(batch, return_attention=True)
        total += torch.stack([mean_distance(layer.mixed, grid) for layer in attention]) * len(batch)
    model.train(was_training)
    v_pos = torch.full((*total.shape, 3), torch.nan, device=total.device)  # l h 3
    for index in model.config.gpsa_blocks:
        v_pos[index] = model.blocks[index].attn.pos_proj.weight
    strength = -v_pos[:, :, 2:]
    center = torch.where(strength == 0, torch.nan, v_pos[:, :, :2] / (2 * strength))
    return HeadStatistics(gates(model), center, strength[:, :, 0], total / len(images))


@torch.no_grad()
def gates(model: ConViT) -> Tensor:
    """The gate of every head (l h); NaN in self-attention layers."""
    gates = torch.full((model.config.depth, model.config.num_heads), torch.nan, device=model.pos_embed.device)
    for index in model.config.gpsa_blocks:
        gates[index] = model.blocks[index].attn.gate()
    return gates


def mean_distance(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Non-locality: mean distance from query to key in attention maps (b h n n), in patches (h; Eq. 8 of the paper).

    The class token has no position: only attention between patches counts, renormalized to sum to 1.
    """
    distance = patch_distances(grid).to(maps)
    patches = maps[..., -len(distance) :, -len(distance) :]  # without the class token
    return ((patches * distance).sum(-1) / patches.sum(-1)).mean(dim=(0, 2))


def uniform_non_locality(grid: tuple[int, int]) -> float:
    """The non-locality of uniform attention: a reference line."""
    return patch_distances(grid).mean().item()


def patch_distances(grid: tuple[int, int]) -> Tensor:
    """Euclidean distance between all pairs of patches of a grid (Y, X), in patches (n n)."""
    position = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32) for side in grid))
    return torch.cdist(position, position)


@torch.inference_mode()
def plot_attention(model: ConViT, image, layer: int, head: int | None = None, query: tuple[int, int] | None = None):
    """Plot the position, content, and mixed maps of the heads of a layer, from one query patch.

    `model` is an RGB model, such as those of `weights.open_model`; `image` is anything that `predict` takes. Layers and
    heads count from 1; by default, all heads are plotted. `query` is (row, column) from 0, by default the center. Each
    map is scaled to its maximum, but at least to four times uniform attention. Returns a matplotlib Figure. Raises
    ValueError for an unreadable image, or a layer, head, or query that is out of range.
    """
    # here, since statistics do not need it; from pyplot, since notebooks display figures only after its import
    from matplotlib.pyplot import Figure, Rectangle

    crop_pct = getattr(model, "crop_pct", default_crop_pct(*model.config.image_shape))  # an untrained model has none
    pixels = load_crop(image, *model.config.image_shape, crop_pct)
    attention = model(normalize(pixels[None]).to(model.pos_embed), return_attention=True)[1]
    rows, columns = model.config.grid
    row, column = query or (rows // 2, columns // 2)
    check_index("layer", layer, 1, len(attention))
    check_index("head", 1 if head is None else head, 1, model.config.num_heads)
    check_index("row", row, 0, rows - 1)
    check_index("column", column, 0, columns - 1)

    content, position, gate, mixed = attention[layer - 1]
    uniform = 1 / mixed.shape[-1]
    maps = {"position": position, "content": content[0], "mixed": mixed[0]}
    maps = {name: tensor.float().cpu() for name, tensor in maps.items() if tensor is not None}
    heads = range(model.config.num_heads) if head is None else [head - 1]
    figure = Figure(figsize=(1.4 * len(maps) + 1.6, 1.6 * len(heads)), layout="constrained")
    panels = figure.subplots(len(heads), len(maps) + 1, squeeze=False)
    for index, panel_row in zip(heads, panels, strict=True):
        panel_row[0].imshow(pixels.permute(1, 2, 0).numpy(), extent=(0, columns, rows, 0))
        panel_row[0].set_ylabel(f"head {index + 1}", rotation=0, ha="right", va="center")
        for panel, (name, tensor) in zip(panel_row[1:], maps.items(), strict=True):
            head_map = tensor[index][-rows * columns :, -rows * columns :][row * columns + column]  # of the patches
            highest = head_map.max().item()
            scale = {"vmin": 0, "vmax": max(highest, 4 * uniform)}  # as on the page: flat maps stay dark
            panel.imshow(head_map.unflatten(0, (rows, columns)).numpy(), extent=(0, columns, rows, 0), **scale)
            share = f", gate {gate[index]:.2f}" if name == "mixed" and position is not None else ""
            panel.set_title(f"{name}{share}\nmaximum {highest:.2g}", fontsize="small")
        for panel in panel_row:
            panel.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="white", linewidth=1.5))
            panel.set(xticks=[], yticks=[])
    figure.suptitle(f"layer {layer}, query patch ({row}, {column}), uniform attention {uniform:.2g}", fontsize="medium")
    return figure


def check_index(name: str, index: int, lowest: int, highest: int):
    """Raise ValueError, with a message for the user, if an index is not an integer or is out of range."""
    if not (isinstance(index, Integral) and lowest <= index <= highest):
        raise ValueError(f"expected a {name} from {lowest} to {highest}, not {index}")


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The records of metrics.jsonl, one per epoch."""
    return read_json_lines(Path(run_dir) / "metrics.jsonl")


def read_json_lines(file: Path) -> list[dict]:
    """The records of a file with one per line. An incomplete last line, left by an interruption, is ignored.

    Raises ValueError if another line is damaged.
    """
    lines = file.read_text().splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise ValueError(f"{file.parent.name}/{file.name} is damaged ({error})") from error
