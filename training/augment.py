"""Augmentation of whole batches on their device, every image with its own random draw.

All draws use PyTorch's generator of that device, so torch.manual_seed makes them reproducible.
"""

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Beta


def derive_seed(*key) -> int:
    """A seed for torch.manual_seed that differs for every tuple of numbers or strings."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")


def random_crop(images: Tensor, padding: int) -> Tensor:
    """Random crop after zero-padding each side by `padding` pixels: b c H W -> b c H W."""
    if padding == 0:
        return images
    b, _, height, width = images.shape
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # b c top left H W, a view
    top, left = torch.randint(0, 2 * padding + 1, (2, b), device=images.device)
    return windows[torch.arange(b, device=images.device), :, top, left]


def random_hflip(images: Tensor, enabled: bool = True) -> Tensor:
    """Flip half of the images horizontally: b c H W -> b c H W."""
    if not enabled:
        return images
    flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(flipped, images.flip(-1), images)


def random_erasing(images: Tensor, probability: float) -> Tensor:
    """Fill a rectangle of some normalized images (b c H W) with noise, pixel by pixel.

    As in DeiT's recipe: 2% to a third of the area, aspect ratio 3:10 to 10:3.
    """
    if probability == 0:
        return images
    b, _, height, width = images.shape
    area = torch.empty(b, device=images.device).uniform_(0.02, 1 / 3) * height * width
    aspect = torch.empty(b, device=images.device).uniform_(-math.log(10 / 3), math.log(10 / 3)).exp()
    box_height, box_width = (area * aspect).sqrt().clamp(max=height), (area / aspect).sqrt().clamp(max=width)
    top = torch.rand(b, device=images.device) * (height - box_height)
    left = torch.rand(b, device=images.device) * (width - box_width)
    box = _box_mask(top, left, top + box_height, left + box_width, height, width)
    erased = torch.rand(b, 1, 1, 1, device=images.device) < probability
    return torch.where(box & erased, torch.randn_like(images), images)


def mixup_cutmix(images: Tensor, targets: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix, each with probability 1/2 if both are on: (b c H W) (b k) -> mixed images and targets.

    `mixup` and `cutmix` are the parameters of their Beta distributions; 0 turns one off.
    """
    if mixup == cutmix == 0:
        return images, targets
    b, _, height, width = images.shape
    device = images.device
    weight = torch.ones(b, 1, height, width, device=device)  # of each image in its own pixels
    if mixup > 0:
        weight = weight * _sample_beta(mixup, b, device)[:, None, None, None]
    if cutmix > 0:
        side = (1 - _sample_beta(cutmix, b, device)).sqrt()
        y, x = torch.rand(b, device=device) * height, torch.rand(b, device=device) * width
        half_height, half_width = side * height / 2, side * width / 2
        box = _box_mask(y - half_height, x - half_width, y + half_height, x + half_width, height, width)
        use_cutmix = torch.rand(b, 1, 1, 1, device=device) < (0.5 if mixup > 0 else 1.0)
        weight = torch.where(use_cutmix, (~box).float(), weight)
    partner = torch.randperm(b, device=device)
    target_weight = weight.mean(dim=(1, 2, 3))[:, None]
    return torch.lerp(images[partner], images, weight), torch.lerp(targets[partner], targets, target_weight)


def _sample_beta(parameter: float, b: int, device: torch.device) -> Tensor:
    """Samples of Beta(parameter, parameter): b."""
    parameters = torch.full((b,), parameter, device=device)
    return Beta(parameters, parameters, validate_args=False).sample()  # validation would synchronize with the GPU


def _box_mask(top: Tensor, left: Tensor, bottom: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """Which pixels have their center in the box of their image: b 1 H W."""
    y = torch.arange(height, device=top.device)[:, None] + 0.5
    x = torch.arange(width, device=top.device) + 0.5
    top, left, bottom, right = (edge[:, None, None] for edge in (top, left, bottom, right))
    return ((y >= top) & (y < bottom) & (x >= left) & (x < right))[:, None]
