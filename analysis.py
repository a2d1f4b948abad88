"""What the heads of a ConViT do, as tensors: gate, attention centre, locality strength and non-locality.

Everything is per layer and head, (l h); plain blocks have no position and so hold NaN in all but the non-locality.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from convit_min import GPSA, ConViT, HeadAttention


class HeadStatistics(NamedTuple):
    """One reading of all heads; NaN where a plain block has no such number."""

    gate: Tensor  # l h: sigmoid(gating_param), 1 is all position, 0 all content
    centre: Tensor  # l h 2: attention centre (dx, dy) in patches, right and down positive
    strength: Tensor  # l h: locality strength alpha; negative where a head has come to avoid its centre
    non_locality: Tensor  # l h: mean attended distance in patches


@torch.no_grad()
def head_statistics(model: ConViT, images: Tensor, batch_size: int = 64) -> HeadStatistics:
    """Read every head of a model, its non-locality on these images (b c H W, normalised) where attention happens."""
    was_training = model.training
    model.eval()
    grid = tuple(side // model.config.patch_size for side in images.shape[-2:])
    total = sum(
        torch.stack([non_locality(layer, grid) for layer in model(batch, return_attention=True)[1]]) * len(batch)
        for batch in images.split(batch_size)
    )
    model.train(was_training)
    return HeadStatistics(gates(model), attention_centres(model), locality_strengths(model), total / len(images))


def gates(model: ConViT) -> Tensor:
    """sigmoid(gating_param) of every head (l h)."""
    return _per_head(model, lambda attn: attn.gating_param.sigmoid())


def locality_strengths(model: ConViT) -> Tensor:
    """alpha = -v_pos[2] of every head (l h): how sharply it looks at its attention centre."""
    return _per_head(model, lambda attn: -attn.pos_proj.weight[:, 2])


def attention_centres(model: ConViT) -> Tensor:
    """Delta = v_pos[:2] / (2 alpha) of every head: (dx, dy) in patches (l h 2). NaN where alpha is 0: there is none.

    With a negative alpha this is the place that the head avoids.
    """
    return _per_head(model, lambda attn: _centre(attn.pos_proj.weight), (2,))


def non_locality(attention: HeadAttention, grid: tuple[int, int]) -> Tensor:
    """Mean attended distance of every head of a block in patches (h), averaged over images and queries (Eq. 8).

    A class token has no place: where one has joined, only what patches give to patches counts, scaled to sum to 1.
    """
    distance = patch_distances(grid).to(attention.mixed)
    extra = attention.mixed.shape[-1] - len(distance)
    patches = attention.mixed[..., extra:, extra:]
    return ((patches * distance).sum(-1) / patches.sum(-1)).mean(dim=(0, 2))


def uniform_non_locality(grid: tuple[int, int]) -> float:
    """The non-locality of a head that looks everywhere alike: the line to compare with."""
    return patch_distances(grid).mean().item()


def patch_distances(grid: tuple[int, int]) -> Tensor:
    """Euclidean distance in patches between any two of a grid's (Y, X) patches (n n)."""
    place = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32) for side in grid))
    return torch.cdist(place, place)


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, one an epoch; an unfinished last one, of a run cut off, is left out."""
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _centre(v_pos: Tensor) -> Tensor:
    curvature = v_pos[:, 2:]
    return torch.where(curvature == 0, torch.nan, v_pos[:, :2] / (-2 * curvature))


def _per_head(model: ConViT, read, shape: tuple[int, ...] = ()) -> Tensor:
    """What `read` says of every layer, of `shape` for each head (l h ...); NaN for plain layers."""
    nothing = torch.full((model.config.num_heads, *shape), torch.nan, device=model.pos_embed.device)
    layers = [block.attn for block in model.blocks]
    return torch.stack([read(attn).detach().float() if isinstance(attn, GPSA) else nothing for attn in layers])
