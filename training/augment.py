"""Augmentation of whole batches, on the device that they are on, every image by its own draw.

All draws are PyTorch's own random numbers on that device: torch.manual_seed makes them repeat.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Beta


def shift(images: Tensor, largest: int) -> Tensor:
    """Move every image by up to `largest` pixels each way, black coming in: b c H W -> b c H W."""
    if largest == 0:
        return images
    b, c, height, width = images.shape
    device = images.device
    offset = torch.randint(0, 2 * largest + 1, (2, b, 1), device=device)
    rows, columns = offset[0] + torch.arange(height, device=device), offset[1] + torch.arange(width, device=device)
    padded = F.pad(images, [largest] * 4)
    image, channel = torch.arange(b, device=device), torch.arange(c, device=device)
    return padded[image[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def flip(images: Tensor, wanted: bool = True) -> Tensor:
    """Mirror half of the images left to right, if that is wanted: b c H W -> b c H W."""
    if not wanted:
        return images
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def colour_jitter(images: Tensor, strength: float) -> Tensor:
    """Change brightness, contrast and saturation, each by its own factor 1 - strength .. 1 + strength.

    Pictures of 0..255 (b 3 H W) in, float ones out.
    """
    if strength == 0:
        return images
    factors = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1, device=images.device) - 1)
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]  # of luma (ITU-R 601)
    images = images * factors[0]
    grey = (images * weights).sum(dim=1, keepdim=True)
    images = torch.lerp(grey.mean(dim=(2, 3), keepdim=True), images, factors[1])
    grey = (images * weights).sum(dim=1, keepdim=True)
    return torch.lerp(grey, images, factors[2]).clamp(0, 255)


def erase(images: Tensor, probability: float) -> Tensor:
    """Fill a rectangle with noise in some of the images, normalised ones (b c H W): random erasing, pixel by pixel.

    As in the recipe of DeiT: 2% to a third of the area, sides 3:10 to 10:3.
    """
    if probability == 0:
        return images
    b, _, height, width = images.shape
    area = torch.empty(b, device=images.device).uniform_(0.02, 1 / 3) * height * width
    aspect = torch.empty(b, device=images.device).uniform_(-math.log(10 / 3), math.log(10 / 3)).exp()
    box_height, box_width = (area * aspect).sqrt().clamp(max=height), (area / aspect).sqrt().clamp(max=width)
    top = torch.rand(b, device=images.device) * (height - box_height)
    left = torch.rand(b, device=images.device) * (width - box_width)
    inside = _inside(top, left, top + box_height, left + box_width, height, width)
    chosen = torch.rand(b, 1, 1, 1, device=images.device) < probability
    return torch.where(inside & chosen, torch.randn_like(images), images)


def mix(images: Tensor, targets: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix, half and half where both are on: b c H W and b k -> the same, targets mixed in proportion.

    `mixup` and `cutmix` are the parameters of their Beta distributions; 0 switches one off.
    """
    if mixup == cutmix == 0:
        return images, targets
    b, _, height, width = images.shape
    device = images.device
    share = torch.ones(b, 1, height, width, device=device)  # of an image in each of its own pixels
    if mixup > 0:
        share = share * _beta(mixup, b, device)[:, None, None, None]
    if cutmix > 0:
        side = (1 - _beta(cutmix, b, device)).sqrt()
        y, x = torch.rand(b, device=device) * height, torch.rand(b, device=device) * width
        half_height, half_width = side * height / 2, side * width / 2
        box = _inside(y - half_height, x - half_width, y + half_height, x + half_width, height, width)
        cut = torch.rand(b, 1, 1, 1, device=device) < (0.5 if mixup > 0 else 1.0)
        share = torch.where(cut, (~box).float(), share)
    partner = torch.randperm(b, device=device)
    own = share.mean(dim=(1, 2, 3))[:, None]
    return torch.lerp(images[partner], images, share), torch.lerp(targets[partner], targets, own)


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """One-hot targets with a share `smoothing` spread over all classes: b -> b k."""
    return F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def _beta(parameter: float, b: int, device: torch.device) -> Tensor:
    """Draws from Beta(parameter, parameter): b."""
    parameters = torch.full((b,), parameter, device=device)
    return Beta(parameters, parameters, validate_args=False).sample()  # the check would wait for the device


def _inside(top: Tensor, left: Tensor, bottom: Tensor, right: Tensor, height: int, width: int) -> Tensor:
    """Which pixels have their middle in the box of their image: b 1 H W."""
    y = torch.arange(height, device=top.device)[:, None] + 0.5
    x = torch.arange(width, device=top.device) + 0.5
    top, left, bottom, right = (side[:, None, None] for side in (top, left, bottom, right))
    return ((y >= top) & (y < bottom) & (x >= left) & (x < right))[:, None]
