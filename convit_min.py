"""ConViT in one file: the complete model, using only PyTorch and einops.

ConViT (d'Ascoli et al., 2021, https://arxiv.org/abs/2103.10697) is a vision transformer whose first blocks use gated
positional self-attention (GPSA). Every GPSA head blends two attention maps with a learned gate:

    content    C = softmax(q k^T / sqrt(d))       depends on the image
    position   P = softmax(v_pos . r)             scores depend only on the offset from query to key, in patches:
                                                  r = (dx, dy, dx^2 + dy^2), dx to the right, dy down
    mixed      A = (1 - g) C + g P                g = sigmoid(gating_param), one learned gate per head (paper: lambda)
    output     proj(A v)

Each map is normalized before mixing, since the raw scores have unrelated scales: the rows of A sum to 1, and g is the
positional fraction of a head. At the border, P is renormalized over the patches that exist; a convolution would pad.

A GPSA layer is initialized as a blurred convolution: position dominates (g = 0.73), and content is nearly uniform, as q
and k are small. With v_pos = alpha (2 Dx, 2 Dy, -1), P is a Gaussian around the offset (Dx, Dy), with standard
deviation 1 / sqrt(2 alpha) per axis; each head is assigned one tap of a small kernel. Read a trained head the same way:
alpha = -v_pos[2], (Dx, Dy) = v_pos[:2] / (2 alpha). If alpha < 0, the head avoids that point.

Released ConViT checkpoints load without conversion. At another image size, P is recomputed and pos_embed interpolated.
Shapes: b batch, c channels, H W pixels, h heads, d = c / h channels per head, n tokens: Y rows times X columns of
patches, plus 1 with the class token. In patterns with both grids, Y X index the query and lowercase y x the key.
"""

import difflib
import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Grid = tuple[int, int]  # rows and columns of patches: Y, X


@dataclass(frozen=True)
class ConViTConfig:  # raises ValueError for invalid settings
    img_size: int | tuple[int, int] = 224  # or (H, W)
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000  # 0: return features
    dim: int = 192
    depth: int = 12
    num_heads: int = 4  # also taps of the initial kernel: 4 gives 2 x 2, 9 gives 3 x 3, 6 gives 2 x 3, 7 gives 1 x 7
    gpsa_layers: int = 10  # the first gpsa_layers blocks use GPSA, the rest self-attention; 0 gives a plain ViT
    mlp_ratio: float = 4.0
    qkv_bias: bool = False  # True in DeiT
    drop_path: float = 0.0  # stochastic depth rate of the last block, rising linearly from 0 in the first
    locality_strength: float = 1.0  # initial alpha
    conv_init: bool = True  # False: random init (Table 3)
    gate_init: float = 1.0  # a logit: sigmoid(1) = 0.73
    gating: str = "learned"  # "frozen": not trained; with gate_init=0, g stays 0.5 ("no gating", Table 3)
    pool: str = "token"  # or "mean", of the patch tokens

    def __post_init__(self):
        (height, width), patch_size = self.image_shape, self.patch_size
        sizes = height, width, patch_size, self.in_chans, self.dim, self.depth, self.num_heads, self.mlp_ratio
        if min(sizes) <= 0 or self.num_classes < 0:
            raise ValueError("all sizes must be positive, except num_classes, which must be at least 0")
        token_never_joins = self.pool == "token" and self.gpsa_blocks.stop == self.depth
        problems = {  # message: whether it applies
            f"img_size={self.img_size} must be a multiple of {patch_size=}": height % patch_size or width % patch_size,
            f"dim={self.dim} must be a multiple of num_heads={self.num_heads}": self.dim % self.num_heads,
            f"gpsa_layers={self.gpsa_layers} must be 0 to depth={self.depth}": not 0 <= self.gpsa_layers <= self.depth,
            f"drop_path={self.drop_path} must be at least 0 and below 1": not 0 <= self.drop_path < 1,
            f'gating={self.gating!r} must be "learned" or "frozen"': self.gating not in ("learned", "frozen"),
            f'pool={self.pool!r} must be "token" or "mean"': self.pool not in ("token", "mean"),
            'the class token joins after the last GPSA block: lower gpsa_layers or set pool="mean"': token_never_joins,
        }
        if messages := [message for message, applies in problems.items() if applies]:
            raise ValueError("; ".join(messages))

    @property
    def image_shape(self) -> tuple[int, int]:  # in pixels
        return tuple(self.img_size) if isinstance(self.img_size, (tuple, list)) else (self.img_size, self.img_size)

    @property
    def grid(self) -> Grid:
        return self.image_shape[0] // self.patch_size, self.image_shape[1] // self.patch_size

    @property
    def gpsa_blocks(self) -> range:  # consecutive indices; the class token joins after the last
        return range(self.gpsa_layers)


MODELS = {
    # Table 1 of the paper: 5.7, 10.0, 27.8, 49.0, 86.5, and 153.1 million parameters
    "convit_tiny":       ConViTConfig(dim=192, num_heads=4),
    "convit_tiny_plus":  ConViTConfig(dim=256, num_heads=4),
    "convit_small":      ConViTConfig(dim=432, num_heads=9),
    "convit_small_plus": ConViTConfig(dim=576, num_heads=9),
    "convit_base":       ConViTConfig(dim=768, num_heads=16),
    "convit_base_plus":  ConViTConfig(dim=1024, num_heads=16),
    # the paper's DeiT baselines; cls_token includes DeiT's position embedding of the class token
    "deit_tiny":         ConViTConfig(dim=192, num_heads=3, gpsa_layers=0, qkv_bias=True),
    "deit_tiny_plus":    ConViTConfig(dim=256, num_heads=4, gpsa_layers=0, qkv_bias=True),
    "deit_small":        ConViTConfig(dim=384, num_heads=6, gpsa_layers=0, qkv_bias=True),
    "deit_small_plus":   ConViTConfig(dim=576, num_heads=9, gpsa_layers=0, qkv_bias=True),
    "deit_base":         ConViTConfig(dim=768, num_heads=12, gpsa_layers=0, qkv_bias=True),
    "deit_base_plus":    ConViTConfig(dim=1024, num_heads=16, gpsa_layers=0, qkv_bias=True),
    # 32-pixel images: nano (1.2 M) for CPUs, convit_cifar (9.0 M) for GPUs, each followed by its plain ViT
    "convit_cifar_nano": ConViTConfig(32, 4, num_classes=10, dim=144, depth=7, num_heads=9, gpsa_layers=5, mlp_ratio=2),
    "vit_cifar_nano":    ConViTConfig(32, 4, num_classes=10, dim=144, depth=7, num_heads=9, gpsa_layers=0, mlp_ratio=2),
    "convit_cifar":      ConViTConfig(32, 4, num_classes=10, dim=288, depth=9, num_heads=9, gpsa_layers=7),
    "vit_cifar":         ConViTConfig(32, 4, num_classes=10, dim=288, depth=9, num_heads=9, gpsa_layers=0),
}  # fmt: skip


class HeadAttention(NamedTuple):
    content: Tensor  # C: b h n n
    position: Tensor | None  # P: h n n; None without GPSA
    gate: Tensor  # g: h; 0 without GPSA
    mixed: Tensor  # A: b h n n


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """C v, where q, k, and v are b h n d each."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= 256:  # the fused backward is slow here
        return (q / math.sqrt(q.shape[-1]) @ k.mT).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def content_map(q: Tensor, k: Tensor) -> Tensor:
    """C in float32, even under autocast: (b h n d) (b h n d) -> b h n n."""
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):  # meta has no autocast
        return (q.float() @ k.float().mT / math.sqrt(q.shape[-1])).softmax(dim=-1)


def kernel_shape(num_heads: int) -> tuple[int, int]:
    """Rows and columns of the initial kernel: as nearly square as num_heads allows."""
    rows = next(rows for rows in range(math.isqrt(num_heads), 0, -1) if num_heads % rows == 0)
    return rows, num_heads // rows


class GPSA(nn.Module):
    """Gated positional self-attention (Section 3 of the paper): b n c -> b n c, patch tokens of a grid of any size."""

    def __init__(self, config: ConViTConfig):
        super().__init__()
        dim, bias = config.dim, config.qkv_bias
        self.config, self.num_heads = config, config.num_heads
        self.qk = nn.Linear(dim, 2 * dim, bias=bias)
        self.v = nn.Linear(dim, dim, bias=bias)
        self.proj = nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(3, config.num_heads)  # never called: row h of its weight is v_pos of head h
        self.pos_proj.bias.requires_grad_(False)  # unused: softmax cancels it; released checkpoints have it
        gates = torch.full((config.num_heads,), float(config.gate_init))
        self.gating_param = nn.Parameter(gates, requires_grad=config.gating == "learned")

    @torch.no_grad()
    def init_as_convolution(self):
        """Set v and v_pos: v_pos . r = -alpha |(dx, dy) - (Dx, Dy)|^2 + const.

        (Dx, Dy) runs through the taps of a kernel, column by column as in released models: in a 3 x 3 kernel with
        alpha = 1, the second head looks at the left patch: v_pos = (-2, 0, -1). Two taps on a side are at -1/2 and 1/2.
        """
        rows, columns = kernel_shape(self.num_heads)
        head = torch.arange(self.num_heads)
        delta_x, delta_y = head // rows - (columns - 1) / 2, head % rows - (rows - 1) / 2
        v_pos = torch.stack([2 * delta_x, 2 * delta_y, -torch.ones(self.num_heads)], dim=1)
        self.pos_proj.weight.copy_(self.config.locality_strength * v_pos)
        nn.init.eye_(self.v.weight)  # v copies its input, so proj is the kernel: per tap, a map of d channels to c

    def gate(self) -> Tensor:
        return self.gating_param.sigmoid()  # h

    def mix(self, content: Tensor, position: Tensor) -> Tensor:
        """(1 - g) content + g position, for maps (... h n n) and for outputs (... h n d)."""
        return torch.lerp(content, position, self.gate()[:, None, None].to(content.dtype))

    def attention_maps(self, q: Tensor, k: Tensor, grid: Grid) -> HeadAttention:
        """C, P, g, and A as defined at the top of this file, for inspection; `forward` computes A v without A."""
        row, column = torch.cartesian_prod(*map(torch.arange, grid)).to(q.device).unbind(dim=1)  # n each, row by row
        dx, dy = column[None, :] - column[:, None], row[None, :] - row[:, None]  # key minus query: n n
        r = torch.stack([dx, dy, dx**2 + dy**2])  # 3 n n
        v_pos = self.pos_proj.weight.float()  # h 3
        content = content_map(q, k)  # b h n n
        position = (v_pos[:, :, None, None] * r).sum(dim=1).softmax(dim=-1)  # h n n
        return HeadAttention(content, position, self.gate(), self.mix(content, position))

    def position_factors(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """P_y (h Y y) and P_x (h X x), whose Kronecker product is P.

        v_pos . r is a function of dx plus a function of dy, and exp of a sum is a product, so the softmax over the grid
        is exactly the product of one softmax per axis. In float32: bfloat16 would round scores of hundreds by about 1.
        """
        slope_x, slope_y, curvature = self.pos_proj.weight[:, :, None, None].unbind(dim=1)  # h 1 1 each
        y, x = (torch.arange(side, dtype=torch.float32, device=slope_x.device) for side in grid)
        dx, dy = x[None, :] - x[:, None], y[None, :] - y[:, None]  # key minus query: X x, Y y
        score_x = slope_x * dx + curvature * dx**2
        score_y = slope_y * dy + curvature * dy**2
        return score_y.softmax(-1), score_x.softmax(-1)

    def forward(self, x: Tensor, grid: Grid, return_attention: bool = False) -> tuple[Tensor, HeadAttention | None]:
        """A v = (1 - g) C v + g P v. P v sums over y, then over x: n (Y + X) d multiplications per head, not n^2 d."""
        q, k = rearrange(self.qk(x), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        v = rearrange(self.v(x), "b n (h d) -> b h n d", h=self.num_heads).contiguous()  # one copy, for C v and P v
        content_out = attend(q, k, v)  # C v
        position_y, position_x = (factor.to(v.dtype) for factor in self.position_factors(grid))
        rows = rearrange(v, "b h (y x) d -> b h y (x d)", y=grid[0])
        columns = rearrange(position_y @ rows, "b h Y (x d) -> b h Y x d", x=grid[1])
        position_out = (position_x[:, None] @ columns).flatten(2, 3)  # P v
        out = rearrange(self.mix(content_out, position_out), "b h n d -> b n (h d)")
        return self.proj(out), self.attention_maps(q, k, grid) if return_attention else None


class SelfAttention(nn.Module):  # b n c -> b n c
    def __init__(self, config: ConViTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, grid: Grid, return_attention: bool = False) -> tuple[Tensor, HeadAttention | None]:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        out = self.proj(rearrange(attend(q, k, v), "b h n d -> b n (h d)"))
        if not return_attention:
            return out, None
        content = content_map(q, k)
        return out, HeadAttention(content, None, content.new_zeros(self.num_heads), content)


class DropPath(nn.Dropout):
    """Stochastic depth: in training, drop the whole residual branch of a sample with probability p."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout1d(x.flatten(1)[None], self.p, self.training).view_as(x)  # 1 b (n c): a sample is a "channel"


class Block(nn.Module):  # pre-norm: b n c -> b n c
    def __init__(self, config: ConViTConfig, index: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = GPSA(config) if index in config.gpsa_blocks else SelfAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        fc1 = nn.Linear(config.dim, int(config.dim * config.mlp_ratio))
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=nn.Linear(fc1.out_features, config.dim)))
        self.drop_path = DropPath(config.drop_path * index / max(config.depth - 1, 1))

    def forward(self, x: Tensor, grid: Grid, return_attention: bool = False) -> tuple[Tensor, HeadAttention | None]:
        attn_out, attention = self.attn(self.norm1(x), grid, return_attention)
        x = x + self.drop_path(attn_out)
        return x + self.drop_path(self.mlp(self.norm2(x))), attention


class ConViT(nn.Module):
    """GPSA blocks, then self-attention blocks; the class token joins between them, since it has no grid position."""

    def __init__(self, config: ConViTConfig):
        super().__init__()
        self.config = config
        conv = nn.Conv2d(config.in_chans, config.dim, config.patch_size, stride=config.patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=conv))  # named as in released checkpoints
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(config.grid), config.dim))
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim)) if config.pool == "token" else None
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.num_classes) if config.num_classes else nn.Identity()
        for name, param in self.named_parameters():  # patch_embed and norms keep PyTorch's defaults
            if name in ("pos_embed", "cls_token") or (name.endswith("weight") and param.ndim == 2):
                nn.init.trunc_normal_(param, std=0.02)
            elif name.endswith("bias") and not name.startswith("patch_embed"):
                nn.init.zeros_(param)
        if config.conv_init:  # last: the rule above also sets v.weight and pos_proj.weight
            for index in config.gpsa_blocks:
                self.blocks[index].attn.init_as_convolution()

    def encode(self, images: Tensor, return_attention: bool = False) -> tuple[Tensor, list[HeadAttention | None]]:
        """Images (b c H W) -> tokens after the last norm (b n c), the class token first; maps of each block or None."""
        if any(side % self.config.patch_size for side in images.shape[-2:]):
            raise ValueError(f"image sides must be multiples of patch_size={self.config.patch_size}")
        x = self.patch_embed(images)
        grid = x.shape[-2:]
        pos_embed = resize_pos_embed(self.pos_embed, self.config.grid, grid)
        x = rearrange(x, "b c Y X -> b (Y X) c").contiguous() + pos_embed  # contiguous, or every block would copy x
        attention = []
        for index, block in enumerate(self.blocks):
            if index == self.config.gpsa_blocks.stop and self.cls_token is not None:
                x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
            x, maps = block(x, grid, return_attention)
            attention.append(maps)
        return self.norm(x), attention

    def forward_features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patch tokens (b n c) and the class token (b c; None with pool="mean"), both after the last norm."""
        x, _ = self.encode(images)
        return (x, None) if self.cls_token is None else (x[:, 1:], x[:, 0])

    def forward(self, images: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, list[HeadAttention]]:
        """Images (b c H W), H and W multiples of patch_size -> logits (b num_classes) and, if asked, maps by block."""
        x, attention = self.encode(images, return_attention)
        logits = self.head(x.mean(dim=1) if self.cls_token is None else x[:, 0])
        return (logits, attention) if return_attention else logits


def resize_pos_embed(pos_embed: Tensor, old: Grid, new: Grid) -> Tensor:
    """Interpolate a position embedding from one grid (Y, X) to another (half types: in float32): 1 n c -> 1 n c."""
    if not any(isinstance(side, torch.SymInt) for side in new) and tuple(old) == tuple(new):  # SymInt: in an export
        return pos_embed
    image = rearrange(pos_embed.to(torch.promote_types(pos_embed.dtype, torch.float)), "1 (Y X) c -> 1 c Y X", Y=old[0])
    image = F.interpolate(image, size=tuple(new), mode="bicubic", antialias=True)
    return rearrange(image, "1 c Y X -> 1 (Y X) c").to(pos_embed.dtype)


def create_model(name: str, **overrides) -> ConViT:
    """Build a model of MODELS, any field of ConViTConfig overridden: create_model("convit_tiny", num_classes=10)."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; did you mean {difflib.get_close_matches(name, MODELS, cutoff=0)}?")
    return ConViT(replace(MODELS[name], **overrides))


if __name__ == "__main__":  # one head at initialization: its maps from the query patch at row 4, column 4 of 8 x 8
    _, attention = create_model("convit_cifar_nano")(torch.rand(1, 3, 32, 32), return_attention=True)
    content, position, gate, mixed = attention[0]
    print(f"head 2 of layer 1: gate {gate[1]:.2f}; attention to the patch and its 8 neighbors")
    for name, head_map in (("C", content[0, 1]), ("P", position[1]), ("A", mixed[0, 1])):
        print(name, head_map[4 * 8 + 4].detach().unflatten(0, (8, 8))[3:6, 3:6], sep="\n")
