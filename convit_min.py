"""ConViT in one file: the whole model is here, on PyTorch and einops alone.

ConViT (d'Ascoli et al., 2021, https://arxiv.org/abs/2103.10697) is a vision transformer whose first blocks use gated
positional self-attention (GPSA). Every GPSA head mixes two attention maps and learns how much of each it wants:

    content    C = softmax(q k^T / sqrt(d))       what the patches show; another map for every image
    position   P = softmax(v_pos . r)             where the patches lie; the same map for every image
               r = (dx, dy, dx^2 + dy^2)          the offset from query to key, in patches
    mixed      A = (1 - g) C + g P                g = sigmoid(gating_param), one number for each head
    output     proj(A v)

A head starts as one tap of a convolution: P is a narrow Gaussian around one neighbour of the query, g = 0.73 favours it,
and the values v are the patches themselves. Training may then lower g, and the head leaves position for content.

Two identities make this nearly as cheap as plain attention, with no n x n position map in memory:

    P = P_y (x) P_x                               a Gaussian is separable: a Y x Y map times an X x X map (Kronecker)
    A v = (1 - g) C v + g P v                     and C v is PyTorch's fused scaled_dot_product_attention

Axis letters: b images, c channels of a token, h heads, d channels of one head, Y X rows and columns of the patch grid,
n tokens (n = Y X, row by row; one more once the class token has joined). Attention maps are (query, key): where a
pattern needs the same axis twice, the key's letter is the small one (h Y y), and each row sums to 1.
"""

import difflib
import math
import os
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class ConViTConfig:
    """Everything that shapes a model. Raises ValueError, saying what to change, for a combination that cannot work."""

    img_size: int | tuple[int, int] = 224  # pixels, or (height, width): the grid on which pos_embed is learned
    patch_size: int = 16  # pixels; a patch becomes a token
    in_chans: int = 3  # 1 for grey pictures
    num_classes: int = 1000  # 0 leaves the head out: a backbone that returns features
    dim: int = 192  # width of a token
    depth: int = 12  # number of blocks
    num_heads: int = 4  # the taps of the initial kernel: 4 make 2 x 2, 9 make 3 x 3, 6 make 2 x 3
    gpsa_layers: int = 10  # the first blocks use GPSA, the rest plain attention; 0 is a plain ViT
    mlp_ratio: float = 4.0  # hidden width of the MLP, in units of dim
    qkv_bias: bool = False  # DeiT has these biases, ConViT does not
    drop_path: float = 0.0  # stochastic depth, rising from 0 in the first block to this in the last
    locality_strength: float = 1.0  # alpha of the initial Gaussians, about 1 / sqrt(alpha) patches wide
    conv_init: bool = True  # False: position and values start at random (an ablation of Table 3)
    gate_init: float = 1.0  # gating_param before training; sigmoid(1) = 0.73: position leads, content is not silent
    gating: str = "learned"  # "frozen" keeps every gate at gate_init (an ablation of Table 3)
    pool: str = "token"  # what the head reads: the class "token", or the "mean" of the patches

    def __post_init__(self):
        height, width = self.image_shape
        for possible, problem in (
            (
                self.patch_size > 0 and height > 0 and width > 0 and not (height % self.patch_size or width % self.patch_size),
                f"img_size {height} x {width} must be a multiple of patch_size={self.patch_size} on both sides",
            ),
            (self.dim > 0 and self.num_heads > 0 and self.dim % self.num_heads == 0,
             f"dim={self.dim} must be a multiple of num_heads={self.num_heads}"),
            (0 <= self.gpsa_layers <= self.depth and self.depth > 0,
             f"gpsa_layers={self.gpsa_layers} must lie between 0 and depth={self.depth}, and depth be at least 1"),
            (self.pool in ("token", "mean"), f'pool={self.pool!r} must be "token" or "mean"'),
            (self.pool == "mean" or self.gpsa_layers < self.depth,
             'pool="token" needs a plain block, or the class token never joins: lower gpsa_layers or set pool="mean"'),
            (self.gating in ("learned", "frozen"), f'gating={self.gating!r} must be "learned" or "frozen"'),
            (0 <= self.drop_path < 1, f"drop_path={self.drop_path} must be at least 0 and below 1"),
        ):  # fmt: skip
            if not possible:
                raise ValueError(problem)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else tuple(self.img_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches: Y, X."""
        return self.image_shape[0] // self.patch_size, self.image_shape[1] // self.patch_size


# fmt: off
MODELS = {
    # the paper's Table 1: heads 48 wide, 64 in the plus models
    "convit_tiny":       ConViTConfig(dim=192,  num_heads=4),
    "convit_tiny_plus":  ConViTConfig(dim=256,  num_heads=4),
    "convit_small":      ConViTConfig(dim=432,  num_heads=9),
    "convit_small_plus": ConViTConfig(dim=576,  num_heads=9),
    "convit_base":       ConViTConfig(dim=768,  num_heads=16),
    "convit_base_plus":  ConViTConfig(dim=1024, num_heads=16),
    # the DeiT that the paper compares each with
    "deit_tiny":         ConViTConfig(dim=192,  num_heads=3,  gpsa_layers=0, qkv_bias=True),
    "deit_tiny_plus":    ConViTConfig(dim=256,  num_heads=4,  gpsa_layers=0, qkv_bias=True),
    "deit_small":        ConViTConfig(dim=384,  num_heads=6,  gpsa_layers=0, qkv_bias=True),
    "deit_small_plus":   ConViTConfig(dim=576,  num_heads=9,  gpsa_layers=0, qkv_bias=True),
    "deit_base":         ConViTConfig(dim=768,  num_heads=12, gpsa_layers=0, qkv_bias=True),
    "deit_base_plus":    ConViTConfig(dim=1024, num_heads=16, gpsa_layers=0, qkv_bias=True),
    # 8 x 8 patches of 32-pixel pictures, 3 x 3 taps: one for two CPU cores, one for a GPU
    "convit_cifar_nano": ConViTConfig(32, 4, num_classes=10, dim=144, num_heads=9, depth=7, gpsa_layers=5, mlp_ratio=2),
    "convit_cifar":      ConViTConfig(32, 4, num_classes=10, dim=288, num_heads=9, depth=9, gpsa_layers=7),
}
# fmt: on
MODELS["vit_cifar_nano"] = replace(MODELS["convit_cifar_nano"], gpsa_layers=0)
MODELS["vit_cifar"] = replace(MODELS["convit_cifar"], gpsa_layers=0)
RELEASED = {name: f"https://dl.fbaipublicfiles.com/convit/{name}.pth" for name in ("convit_tiny", "convit_small", "convit_base")}
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class HeadAttention(NamedTuple):
    """What the heads of one block attend to; every row of a map sums to 1."""

    content: Tensor  # b h n n
    position: Tensor | None  # h n n; None in plain self-attention
    gate: Tensor  # h, the sigmoid already taken; 0 in plain self-attention
    mixed: Tensor  # b h n n, the map that the values are averaged with


def kernel_shape(num_heads: int) -> tuple[int, int]:
    """Rows and columns of the kernel whose taps the heads start as: the most nearly square one with num_heads taps."""
    rows = max(rows for rows in range(1, num_heads + 1) if rows * rows <= num_heads and num_heads % rows == 0)
    return rows, num_heads // rows


def convolutional_taps(num_heads: int) -> Tensor:
    """Initial attention centre (dx, dy) of every head, in patches (h 2). The released order runs down, column by column."""
    rows, columns = kernel_shape(num_heads)
    head = torch.arange(num_heads)
    return torch.stack([head // rows - (columns - 1) / 2, head % rows - (rows - 1) / 2], dim=-1)


def axis_attention(slope: Tensor, curvature: Tensor, length: int) -> Tensor:
    """Softmax over keys of slope * offset + curvature * offset^2 along one axis of the grid: (h) (h) -> (h n n)."""
    index = torch.arange(length, device=slope.device, dtype=slope.dtype)
    offset = index[None, :] - index[:, None]  # key minus query
    return (slope[:, None, None] * offset + curvature[:, None, None] * offset**2).softmax(dim=-1)


class GPSA(nn.Module):
    """Gated positional self-attention (Section 3): b Y X c -> b Y X c, on any grid."""

    def __init__(self, config: ConViTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qk = nn.Linear(config.dim, 2 * config.dim, bias=config.qkv_bias)
        self.v = nn.Linear(config.dim, config.dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.dim, config.dim)
        self.pos_proj = nn.Linear(3, config.num_heads)  # weight h: v_pos = (a, b, c), the factors of dx, dy, dx^2 + dy^2
        self.gating_param = nn.Parameter(torch.full((config.num_heads,), float(config.gate_init)))
        self.gating_param.requires_grad_(config.gating == "learned")
        self.pos_proj.bias.requires_grad_(False)  # cancels in the softmax; here because released weights have it

    @torch.no_grad()
    def convolutional_init(self, locality_strength: float):
        """Make head h a Gaussian around its tap Delta: v_pos = alpha (2 Delta_x, 2 Delta_y, -1), values = input (Eq. 5)."""
        taps = convolutional_taps(self.num_heads)
        self.pos_proj.weight.copy_(locality_strength * torch.cat([2 * taps, -torch.ones(self.num_heads, 1)], dim=1))
        nn.init.eye_(self.v.weight)

    def position_attention(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Where each head looks, whatever the image shows: P_y (h Y Y) and P_x (h X X), in float32."""
        slope_x, slope_y, curvature = self.pos_proj.weight.float().unbind(dim=1)
        return axis_attention(slope_y, curvature, height), axis_attention(slope_x, curvature, width)

    def forward(self, x: Tensor, return_attention: bool = False) -> tuple[Tensor, HeadAttention | None]:
        height, width = x.shape[1:3]
        q, k = rearrange(self.qk(x), "b Y X (two h d) -> two b h (Y X) d", two=2, h=self.num_heads)
        v = rearrange(self.v(x), "b Y X (h d) -> b h Y X d", h=self.num_heads)
        gate = self.gating_param.sigmoid()
        position_y, position_x = self.position_attention(height, width)

        by_content = F.scaled_dot_product_attention(q, k, v.flatten(2, 3))
        by_position = position_y.to(v.dtype)[None] @ v.flatten(3)
        by_position = position_x.to(v.dtype)[:, None] @ by_position.unflatten(3, (width, -1))
        mixed = torch.lerp(by_content, by_position.flatten(2, 3), gate.to(v.dtype)[:, None, None])
        output = self.proj(rearrange(mixed, "b h (Y X) d -> b Y X (h d)", Y=height))
        if not return_attention:
            return output, None

        content = content_attention(q, k)
        position = einsum(position_y, position_x, "h Y y, h X x -> h Y X y x")
        position = rearrange(position, "h Y X y x -> h (Y X) (y x)")
        g = gate.float()[:, None, None]
        return output, HeadAttention(content, position, gate, (1 - g) * content + g * position)


def content_attention(q: Tensor, k: Tensor) -> Tensor:
    """The map that scaled_dot_product_attention keeps to itself: (b h n d) (b h n d) -> (b h n n), in float32."""
    return (q.float() @ k.float().mT * q.shape[-1] ** -0.5).softmax(dim=-1)


class SelfAttention(nn.Module):
    """Plain multi-head self-attention: b n c -> b n c."""

    def __init__(self, config: ConViTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, return_attention: bool = False) -> tuple[Tensor, HeadAttention | None]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        output = self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))
        if not return_attention:
            return output, None
        content = content_attention(q, k)
        return output, HeadAttention(content, None, content.new_zeros(self.num_heads), content)


class MLP(nn.Sequential):
    """... c -> ... c, with one hidden layer."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__(OrderedDict(fc1=nn.Linear(dim, hidden_dim), act=nn.GELU(), fc2=nn.Linear(hidden_dim, dim)))


class DropPath(nn.Module):
    """Stochastic depth: in training, leaves a residual branch out for a random share of the images."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)  # the expectation stays the same


class Block(nn.Module):
    """Attention, then an MLP, each on its normalised input and added to it. Axes as the attention wants them."""

    def __init__(self, config: ConViTConfig, index: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = GPSA(config) if index < config.gpsa_layers else SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = MLP(config.dim, int(config.dim * config.mlp_ratio))
        self.drop_path = DropPath(config.drop_path * index / max(config.depth - 1, 1))

    def forward(self, x: Tensor, return_attention: bool = False) -> tuple[Tensor, HeadAttention | None]:
        update, attention = self.attn(self.norm1(x), return_attention)
        x = x + self.drop_path(update)
        return x + self.drop_path(self.mlp(self.norm2(x))), attention


class ConViT(nn.Module):
    """Patches, position embedding, GPSA blocks on the grid, the class token joins, plain blocks, head."""

    def __init__(self, config: ConViTConfig):
        super().__init__()
        self.config = config
        patches = nn.Conv2d(config.in_chans, config.dim, kernel_size=config.patch_size, stride=config.patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=patches))
        self.pos_embed = nn.Parameter(torch.empty(1, config.grid[0] * config.grid[1], config.dim))
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim)) if config.pool == "token" else None
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.num_classes) if config.num_classes else nn.Identity()
        self._init_weights()

    def _init_weights(self):
        for name, parameter in self.named_parameters():
            if name.endswith(("pos_embed", "cls_token")) or (name.endswith("weight") and parameter.ndim == 2):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias") and not name.startswith("patch_embed"):
                nn.init.zeros_(parameter)
        for block in self.blocks[: self.config.gpsa_layers]:
            if self.config.conv_init:
                block.attn.convolutional_init(self.config.locality_strength)

    def forward(self, images: Tensor, return_attention: bool = False):
        """Logits (b num_classes) of images (b in_chans H W), and with return_attention one HeadAttention per block.

        H and W may be any multiples of patch_size; pos_embed is resized where the grid is not the one it was learned on.
        """
        height, width = (side // self.config.patch_size for side in images.shape[-2:])
        if (height * self.config.patch_size, width * self.config.patch_size) != tuple(images.shape[-2:]):
            raise ValueError(f"images of {tuple(images.shape[-2:])} pixels: both sides must be multiples of patch_size={self.config.patch_size}")
        x = rearrange(self.patch_embed(images), "b c Y X -> b Y X c")
        x = x + rearrange(resize_pos_embed(self.pos_embed, self.config.grid, (height, width)), "1 (Y X) c -> 1 Y X c", Y=height)
        attention = []
        for index, block in enumerate(self.blocks):
            if index == self.config.gpsa_layers:
                x = self.join_class_token(x)
            x, heads = block(x, return_attention)
            attention.append(heads)
        x = self.norm(x)
        x = x[:, 0] if self.cls_token is not None else x.flatten(1, -2).mean(dim=1)
        return (self.head(x), attention) if return_attention else self.head(x)

    def join_class_token(self, x: Tensor) -> Tensor:
        """b Y X c -> b n c. The class token has no place on the grid, so it joins after the last GPSA block."""
        x = rearrange(x, "b Y X c -> b (Y X) c")
        return x if self.cls_token is None else torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)


def create_model(name: str, **changes) -> ConViT:
    """A new model by its name in MODELS, with any field of ConViTConfig changed: create_model("convit_tiny", drop_path=0.1)."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.4) or MODELS
        raise ValueError(f"there is no model {name!r}; the nearest names are {', '.join(near)}")
    return ConViT(replace(MODELS[name], **changes))


def normalise(pictures: Tensor) -> Tensor:
    """Pictures of 0..255 (b 3 H W) as the models expect them, released ones included: ImageNet's mean and deviation."""
    mean, std = (torch.tensor(rgb, device=pictures.device)[:, None, None] for rgb in (PIXEL_MEAN, PIXEL_STD))
    return (pictures.float() / 255 - mean) / std


def freeze_gpsa(model: ConViT):
    """Keep the attention of all GPSA layers as it is now: only what surrounds it learns (an ablation of Table 3)."""
    for block in model.blocks[: model.config.gpsa_layers]:
        for part in (block.attn.qk, block.attn.v, block.attn.pos_proj):
            part.requires_grad_(False)
        block.attn.gating_param.requires_grad_(False)


def resize_pos_embed(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate a position embedding (1 n c) from a grid of old = (Y, X) patches to a new one."""
    if old == new:
        return pos_embed
    pos_embed = rearrange(pos_embed, "1 (Y X) c -> 1 c Y X", Y=old[0])
    return rearrange(F.interpolate(pos_embed, size=new, mode="bicubic", align_corners=False), "1 c Y X -> 1 (Y X) c")


def fit_pos_embed(state, grid):
    """pos_embed of a file, and cls_token where it changes too, for a model with another grid."""
    pos_embed, rows = state["pos_embed"], state["pos_embed"].shape[1]
    fitted = {}
    if "cls_token" in state and rows != grid[0] * grid[1] and math.isqrt(rows - 1) ** 2 == rows - 1:
        fitted["cls_token"], pos_embed = state["cls_token"] + pos_embed[:, :1], pos_embed[:, 1:]
    side = math.isqrt(pos_embed.shape[1])
    if pos_embed.shape[1] != grid[0] * grid[1] and side**2 == pos_embed.shape[1]:
        pos_embed = resize_pos_embed(pos_embed, (side, side), grid)
    return fitted | {"pos_embed": pos_embed}


def load_weights(model: ConViT, source: str | os.PathLike):
    """Load weights from a file, a URL or a name in RELEASED: the authors', DeiT's, timm's or ours, all in one format.

    The tensors lie flat or under "model". Another image size: pos_embed is resized. Another number of classes: the head
    keeps its own weights, with a warning. Raises FileNotFoundError where there is no such file, and ValueError for one
    that is damaged, is no weight file, or does not fit; the model is then as it was. Runs no code from the file.
    """
    source = RELEASED.get(str(source), str(source))
    try:
        if source.startswith(("https://", "http://")):
            state = torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {source}; names that can be downloaded: {', '.join(RELEASED)}") from None
    except Exception as error:  # the unpickler raises nearly anything on damaged input, and all of it means the same
        raise ValueError(f"{source} cannot be read as a file of weights (damaged, or not one): {type(error).__name__}") from error

    state = state.get("model", state) if isinstance(state, dict) else {}
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    own = model.state_dict()
    if "pos_embed" in state:
        state.update(fit_pos_embed(state, model.config.grid))
    if "head.weight" in state and "head.weight" in own and len(state["head.weight"]) != len(own["head.weight"]):
        warnings.warn(f"{source}: {len(state['head.weight'])} classes; the model's head for {len(own['head.weight'])} stays as it was", stacklevel=2)
        state.update({key: own[key] for key in ("head.weight", "head.bias")})

    faults = {
        "missing": own.keys() - state.keys(),
        "unexpected": state.keys() - own.keys(),
        "of another shape": {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape},
    }
    if any(faults.values()):
        found = "; ".join(f"{fault}: {', '.join(sorted(keys))}" for fault, keys in faults.items() if keys)
        raise ValueError(f"the weights of {source} do not fit this model: {found}")
    model.load_state_dict(state)
