"""A generated set of pictures whose label takes both a look at texture and a comparison of two far-apart places.

Every picture shows four squares on noise: a plain one, the cue, and three with textures, each in a colour of its own.
The label is the texture that has the cue's colour. Textures alone leave three candidates, so a third of the answers
right; which of them it is, only another place in the picture tells.
"""

import torch

from training.loop import stream

TEXTURES = ["rows", "columns", "diagonals", "checks"]
COLOURS = torch.tensor([[230, 90, 60], [70, 190, 80], [80, 110, 240]])  # red, green, blue
SQUARE = 8  # pixels
SIZE = 32


def patterns(count: int, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (uint8, n 3 32 32) and labels (n), always the same ones for a split ("train", "test")."""
    generator = torch.Generator().manual_seed(stream("patterns", split))

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    def shuffled(n: int) -> torch.Tensor:
        return torch.rand(count, n, generator=generator).argsort(dim=1)

    y, x = torch.arange(SQUARE)[:, None], torch.arange(SQUARE)
    stripes = torch.stack([(y + 0 * x) // 2 % 2, (0 * y + x) // 2 % 2, (x + y) // 2 % 2, (y // 2 + x // 2) % 2])
    stripes = torch.cat([stripes, torch.ones_like(stripes[:1])])  # the last, all ones, is the cue

    # cells of a 3 x 3 grid; squares lie on whole patches, or a nano model needs far longer
    cells, textures, colours = shuffled(9)[:, :4], shuffled(4)[:, :3], shuffled(3)
    answer = draw(3, count, 1)  # which of the three textures the cue asks for
    textures_of = torch.cat([textures, torch.full_like(answer, 4)], dim=1)
    colours_of = torch.cat([colours, colours.gather(1, answer)], dim=1)
    top = (3 * (cells // 3) + draw(2, count, 4)).clamp(max=6) * 4
    left = (3 * (cells % 3) + draw(2, count, 4)).clamp(max=6) * 4

    images = draw(60, count, 3, SIZE, SIZE).to(torch.int16) + 70
    picture, channel = torch.arange(count)[:, None, None, None], torch.arange(3)[:, None, None]
    for square in range(4):
        inverted = draw(2, count, 1, 1) * (textures_of[:, square, None, None] < 4)  # stripes begin dark or bright
        bright = stripes[textures_of[:, square]] ^ inverted
        pixels = COLOURS[colours_of[:, square]][:, :, None, None] * bright[:, None]
        rows, columns = top[:, square, None, None, None] + y, left[:, square, None, None, None] + x
        images[picture, channel, rows, columns] = pixels.to(torch.int16)
    return images.to(torch.uint8), textures.gather(1, answer)[:, 0]
