"""A synthetic dataset whose label requires both local texture and a comparison of two distant positions.

Every image shows four squares on noise: the cue, which is plain, and three textured ones, each in its own color. The
label is the texture whose color matches the cue. Textures alone leave three candidates, so accuracy without the cue is
capped at 1/3; attention from one square to another resolves it.
"""

import torch
from torch import Tensor

from training.augment import derive_seed

TEXTURES = ["rows", "columns", "diagonals", "checks"]
COLORS = torch.tensor([[230, 90, 60], [70, 190, 80], [80, 110, 240]])  # red, green, blue
SQUARE = 8  # pixels
SIZE = 32


def patterns(count: int, split: str) -> tuple[Tensor, Tensor]:
    """Images (uint8, n 3 32 32) and labels (n), the same for every call with a split ("train" or "test")."""
    generator = torch.Generator().manual_seed(derive_seed("patterns", split))

    def randint(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def permutations(n: int) -> Tensor:
        return torch.rand(count, n, generator=generator).argsort(dim=1)

    # textures as 8 x 8 masks; the last one, all ones, is the cue
    y, x = torch.meshgrid(torch.arange(SQUARE), torch.arange(SQUARE), indexing="ij")
    masks = torch.stack([y // 2, x // 2, (x + y) // 2, y // 2 + x // 2, torch.ones_like(y)]) % 2

    # cells of a 3 x 3 grid, textures, and colors; squares are aligned with patches, or a nano model trains far longer
    cells, textures, colors = permutations(9)[:, :4], permutations(4)[:, :3], permutations(3)
    answer = randint(3, count, 1)  # which of the three textured squares the cue matches
    textures_and_cue = torch.cat([textures, torch.full_like(answer, 4)], dim=1)
    colors_and_cue = torch.cat([colors, colors.gather(1, answer)], dim=1)
    top = (3 * (cells // 3) + randint(2, count, 4)).clamp(max=6) * 4
    left = (3 * (cells % 3) + randint(2, count, 4)).clamp(max=6) * 4

    # draw the squares on noise
    images = randint(60, count, 3, SIZE, SIZE).to(torch.int16) + 70
    image, channel = torch.arange(count)[:, None, None, None], torch.arange(3)[:, None, None]
    for square in range(4):
        texture = textures_and_cue[:, square]
        inverted = randint(2, count, 1, 1) * (texture[:, None, None] < 4)  # textures start dark or bright
        mask = masks[texture] ^ inverted
        pixels = COLORS[colors_and_cue[:, square]][:, :, None, None] * mask[:, None]
        rows, columns = top[:, square, None, None, None] + y, left[:, square, None, None, None] + x
        images[image, channel, rows, columns] = pixels.to(torch.int16)
    return images.to(torch.uint8), textures.gather(1, answer)[:, 0]
