"""ConViT in one file: the whole model is here, on PyTorch and einops alone.

ConViT (d'Ascoli et al., 2021, https://arxiv.org/abs/2103.10697) is a vision transformer whose first blocks use gated
positional self-attention (GPSA). Every GPSA head mixes two attention maps and learns how much of each it wants:

    content    C = softmax(q k^T / sqrt(d))       what the patches show: a different map for every image
    position   P = softmax(v_pos . r)             where the patches lie: the same map for every image
               r = (dx, dy, dx^2 + dy^2)          the offset from query to key, in patches
    mixed      A = (1 - g) C + g P                g = sigmoid(gating_param), one number for each head
    output     proj(A v)

A layer starts as a soft convolution: the P of each head is a Gaussian around one tap of a small kernel centred on the
query, g is 0.73, so P leads, and the weight of v is the identity, so that proj holds one matrix for each tap. Training
can lower g: the head leaves position for content.

Two identities make this nearly as cheap as plain attention, with no n x n position map in memory:

    P = kron(P_y, P_x)                            a Gaussian is separable: one small map for each axis of the grid
    A v = (1 - g) C v + g P v                     and C v is PyTorch's fused scaled_dot_product_attention

Axes: b images, c channels of a token, h heads, d channels of a head, Y X rows and columns of the patch grid, n tokens
(n = Y X, row by row; one more once the class token has joined). The axes of a map are (query, key), and where a pattern
tells them apart, the key's letter is the small one (h Y y). Each row of a map sums to 1.
"""

import difflib
import math
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn


def require(holds: bool, problem: str):
    """Raise ValueError(problem) if something does not hold."""
    if not holds:
        raise ValueError(problem)


@dataclass(frozen=True)
class ConViTConfig:
    """Everything that shapes a model. Raises ValueError, saying what to change, for a combination that cannot work."""

    img_size: int | tuple[int, int] = 224  # side in pixels, or (height, width); sets the grid of pos_embed
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
    conv_init: bool = True  # False: position and values start at random (Table 3: "no conv init")
    gate_init: float = 1.0  # gating_param before training, a logit: sigmoid(1) = 0.73, position leads
    gating: str = "learned"  # "frozen" keeps gating_param at gate_init (Table 3: "no gating", with gate_init=0)
    pool: str = "token"  # what the head reads: the class "token", or the "mean" of the patches

    def __post_init__(self):
        image, patch, heads = self.image_shape, self.patch_size, self.num_heads
        smallest = min(*image, patch, self.in_chans, self.dim, self.depth, heads, self.mlp_ratio, self.num_classes + 1)
        require(smallest > 0, "every size must be above 0, and num_classes at least 0")
        require(not any(side % patch for side in image), f"img_size {image} must be a multiple of patch_size={patch}")
        require(self.dim % heads == 0, f"dim={self.dim} must be a multiple of num_heads={heads}")
        require(0 <= self.gpsa_layers <= self.depth, f"gpsa_layers={self.gpsa_layers} must be 0 to depth={self.depth}")
        require(self.pool in ("token", "mean"), f'pool={self.pool!r} must be "token" or "mean"')
        can_join = self.pool == "mean" or self.gpsa_layers < self.depth
        require(can_join, 'the class token needs a plain block to join: lower gpsa_layers, or set pool="mean"')
        require(self.gating in ("learned", "frozen"), f'gating={self.gating!r} must be "learned" or "frozen"')
        require(0 <= self.drop_path < 1, f"drop_path={self.drop_path} must be at least 0 and below 1")

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
    # the paper's Table 1: heads 48 channels wide, 64 in the plus models
    "convit_tiny":       ConViTConfig(dim=192,  num_heads=4),
    "convit_tiny_plus":  ConViTConfig(dim=256,  num_heads=4),
    "convit_small":      ConViTConfig(dim=432,  num_heads=9),
    "convit_small_plus": ConViTConfig(dim=576,  num_heads=9),
    "convit_base":       ConViTConfig(dim=768,  num_heads=16),
    "convit_base_plus":  ConViTConfig(dim=1024, num_heads=16),
    # the DeiT that the paper compares with each
    "deit_tiny":         ConViTConfig(dim=192,  num_heads=3,  gpsa_layers=0, qkv_bias=True),
    "deit_tiny_plus":    ConViTConfig(dim=256,  num_heads=4,  gpsa_layers=0, qkv_bias=True),
    "deit_small":        ConViTConfig(dim=384,  num_heads=6,  gpsa_layers=0, qkv_bias=True),
    "deit_small_plus":   ConViTConfig(dim=576,  num_heads=9,  gpsa_layers=0, qkv_bias=True),
    "deit_base":         ConViTConfig(dim=768,  num_heads=12, gpsa_layers=0, qkv_bias=True),
    "deit_base_plus":    ConViTConfig(dim=1024, num_heads=16, gpsa_layers=0, qkv_bias=True),
    # 8 x 8 patches of 32-pixel pictures, 3 x 3 taps: one for two CPU cores, one for a GPU, and their plain ViTs
    "convit_cifar_nano": ConViTConfig(32, 4, num_classes=10, dim=144, depth=7, num_heads=9, gpsa_layers=5, mlp_ratio=2),
    "vit_cifar_nano":    ConViTConfig(32, 4, num_classes=10, dim=144, depth=7, num_heads=9, gpsa_layers=0, mlp_ratio=2),
    "convit_cifar":      ConViTConfig(32, 4, num_classes=10, dim=288, depth=9, num_heads=9, gpsa_layers=7),
    "vit_cifar":         ConViTConfig(32, 4, num_classes=10, dim=288, depth=9, num_heads=9, gpsa_layers=0),
}
# fmt: on


class HeadAttention(NamedTuple):
    """What the heads of one block attend to."""

    content: Tensor  # b h n n
    position: Tensor | None  # h n n; None in plain self-attention
    gate: Tensor  # h: g, so after the sigmoid; 0 in plain self-attention
    mixed: Tensor  # b h n n: what the values are averaged with


def kernel_shape(num_heads: int) -> tuple[int, int]:
    """Rows and columns of the initial kernel: as nearly square as num_heads taps allow."""
    rows = next(rows for rows in range(math.isqrt(num_heads), 0, -1) if num_heads % rows == 0)
    return rows, num_heads // rows


def axis_attention(slope: Tensor, curvature: Tensor, length: int) -> Tensor:
    """Softmax over keys of slope * offset + curvature * offset^2 along one axis: (h) (h) -> h length length."""
    index = torch.arange(length, device=slope.device, dtype=slope.dtype)
    offset = index[None, :] - index[:, None]  # key minus query
    return (slope[:, None, None] * offset + curvature[:, None, None] * offset**2).softmax(dim=-1)


def content_attention(q: Tensor, k: Tensor) -> Tensor:
    """The map that scaled_dot_product_attention keeps to itself: (b h n d) (b h n d) -> b h n n, in float32."""
    with torch.autocast(q.device.type, enabled=False):
        return (q.shape[-1] ** -0.5 * (q.float() @ k.float().mT)).softmax(dim=-1)


class GPSA(nn.Module):
    """Gated positional self-attention (Section 3): b Y X c -> b Y X c, on a grid of any size."""

    def __init__(self, config: ConViTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qk = nn.Linear(config.dim, 2 * config.dim, bias=config.qkv_bias)
        self.v = nn.Linear(config.dim, config.dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.dim, config.dim)
        self.pos_proj = nn.Linear(3, config.num_heads)  # row h is v_pos of head h: the factors of dx, dy, dx^2 + dy^2
        self.pos_proj.bias.requires_grad_(False)  # cancels in the softmax; kept because released weights have it
        gates = torch.full((config.num_heads,), float(config.gate_init))
        self.gating_param = nn.Parameter(gates, requires_grad=config.gating == "learned")

    @torch.no_grad()
    def convolutional_init(self, locality_strength: float):
        """Head h becomes tap h of a kernel (Eq. 5): v_pos = alpha (2 Delta_x, 2 Delta_y, -1); v's weight the identity.

        Then v_pos . r = -alpha |(dx, dy) - Delta|^2 + a constant: a Gaussian around the tap Delta. Heads are numbered
        down the columns of the kernel, as in released weights; along a side of even length, taps lie between patches.
        """
        rows, columns = kernel_shape(self.num_heads)
        head = torch.arange(self.num_heads)
        delta_x, delta_y = head // rows - (columns - 1) / 2, head % rows - (rows - 1) / 2
        v_pos = torch.stack([2 * delta_x, 2 * delta_y, -torch.ones(self.num_heads)], dim=1)
        self.pos_proj.weight.copy_(locality_strength * v_pos)
        nn.init.eye_(self.v.weight)

    def position_attention(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Where each head looks, whatever the picture: P_y (h Y y) and P_x (h X x), in float32."""
        slope_x, slope_y, curvature = self.pos_proj.weight.float().unbind(dim=1)
        return axis_attention(slope_y, curvature, height), axis_attention(slope_x, curvature, width)

    def forward(self, x: Tensor, return_attention: bool = False) -> tuple[Tensor, HeadAttention | None]:
        _, height, width, _ = x.shape  # in patches
        q, k = rearrange(self.qk(x), "b Y X (two h d) -> two b h (Y X) d", two=2, h=self.num_heads)
        v = rearrange(self.v(x), "b y x (h d) -> b h y (x d)", h=self.num_heads)
        position_y, position_x = self.position_attention(height, width)
        gate = self.gating_param.sigmoid()

        c_v = F.scaled_dot_product_attention(q, k, rearrange(v, "b h y (x d) -> b h (y x) d", x=width))
        c_v = rearrange(c_v, "b h (Y X) d -> b Y X (h d)", Y=height)
        gp_v = (gate[:, None, None] * position_y).to(v.dtype) @ v  # g P v: the gate goes into the small factor
        gp_v = position_x.to(v.dtype)[:, None] @ rearrange(gp_v, "b h Y (x d) -> b h Y x d", x=width)
        gp_v = rearrange(gp_v, "b h Y X d -> b Y X (h d)")
        # mixed token by token, since head by head is slower in bf16
        content_share = repeat(1 - gate, "h -> (h d)", d=q.shape[-1]).to(v.dtype)
        output = self.proj(content_share * c_v + gp_v)
        if not return_attention:
            return output, None

        content = content_attention(q, k)
        position = rearrange(einsum(position_y, position_x, "h Y y, h X x -> h Y X y x"), "h Y X y x -> h (Y X) (y x)")
        return output, HeadAttention(content, position, gate, content.lerp(position, gate.float()[:, None, None]))


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
    """Two linear layers with a GELU between: ... c -> ... c. The names are those of released weights."""

    def __init__(self, dim: int, hidden: int):
        super().__init__(OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim)))


class DropPath(nn.Module):
    """Stochastic depth: in training, leaves out a residual branch for each image with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate))  # divided, so that the expected value is that of test time


class Block(nn.Module):
    """Attention, then an MLP, each reading a normalised x and adding to it; x is b Y X c with GPSA, else b n c."""

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
    """Patches with a position embedding, GPSA blocks on their grid, the class token, plain blocks, a linear head."""

    def __init__(self, config: ConViTConfig):
        super().__init__()
        self.config = config
        patches = nn.Conv2d(config.in_chans, config.dim, kernel_size=config.patch_size, stride=config.patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=patches))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(config.grid), config.dim))
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim)) if config.pool == "token" else None
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.num_classes) if config.num_classes else nn.Identity()

        for name, parameter in self.named_parameters():  # norms and patch_embed start as PyTorch has them
            if name in ("pos_embed", "cls_token") or (name.endswith("weight") and parameter.ndim == 2):
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.endswith("bias") and not name.startswith("patch_embed"):
                nn.init.zeros_(parameter)
        if config.conv_init:
            for block in self.blocks[: config.gpsa_layers]:
                block.attn.convolutional_init(config.locality_strength)

    def forward(self, images: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, list[HeadAttention]]:
        """Logits (b num_classes) of images (b in_chans height width); if asked, also one HeadAttention per block.

        Height and width are any multiples of patch_size, else ValueError; pos_embed is resized to the grid they give.
        Without a head (num_classes=0) returns features (b dim).
        """
        (height, width), patch = images.shape[-2:], self.config.patch_size
        require(not (height % patch or width % patch), f"{height} x {width} pixels cannot be cut by patch_size={patch}")
        x = rearrange(self.patch_embed(images), "b c Y X -> b Y X c").contiguous()  # or each block makes this copy
        x = x + resize_pos_embed(self.pos_embed, self.config.grid, x.shape[1:3])
        attention = []
        for index, block in enumerate(self.blocks):
            if index == self.config.gpsa_layers:
                x = rearrange(x, "b Y X c -> b (Y X) c")
                if self.cls_token is not None:  # it has no place on the grid, so it joins after the last GPSA block
                    x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
            x, maps = block(x, return_attention)
            attention.append(maps)
        x = self.norm(x)
        logits = self.head(x[:, 0] if self.config.pool == "token" else x.flatten(1, -2).mean(dim=1))
        return (logits, attention) if return_attention else logits


def create_model(name: str, **changes) -> ConViT:
    """A new model by its name in MODELS, any field of ConViTConfig changed. Raises ValueError for an unknown name."""
    nearest = difflib.get_close_matches(name, MODELS, n=3, cutoff=0)
    require(name in MODELS, f"there is no model {name!r}; the nearest names are {', '.join(nearest)}")
    return ConViT(replace(MODELS[name], **changes))


def freeze_gpsa(model: ConViT):
    """Stop training what makes up the attention of GPSA: qk, v, position and gates, not proj (Table 3: "frozen")."""
    for block in model.blocks[: model.config.gpsa_layers]:
        block.attn.requires_grad_(False)
        block.attn.proj.requires_grad_(True)


def normalise(pictures: Tensor) -> Tensor:
    """Scale pictures of 0..255 (b 3 H W) to what all models here expect: ImageNet then has mean 0 and deviation 1."""
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # no tensors: a GPU would be waited for to send them
    channels = zip(pictures.unbind(dim=-3), mean, std, strict=True)
    return torch.stack([(channel / 255 - mean) / std for channel, mean, std in channels], dim=-3)


def resize_pos_embed(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A position embedding (1 n c) learned on a grid of old = (Y, X) patches, interpolated to the new one: 1 Y X c."""
    pos_embed = rearrange(pos_embed, "1 (Y X) c -> 1 Y X c", Y=old[0])
    if tuple(old) == tuple(new):
        return pos_embed
    pos_embed = rearrange(pos_embed, "1 Y X c -> 1 c Y X")
    return rearrange(F.interpolate(pos_embed, size=new, mode="bicubic", antialias=True), "1 c Y X -> 1 Y X c")


def load_weights(model: ConViT, source: str | Path):
    """Load weights from a file, a URL or a released name; the authors', timm's, DeiT's and our own have one format.

    For another image size pos_embed is resized; for another number of classes the model keeps its
    own head, with a warning. Raises FileNotFoundError where there is no such file, and ValueError for a file that is
    damaged, is something else, or does not fit; the model is then as it was, and no code from the file has run.
    """
    (state, grid), own = read_weights(str(source)), model.state_dict()
    pos_embed, cls_token = state.get("pos_embed"), state.get("cls_token")
    if pos_embed is not None and pos_embed.ndim == 3:
        if grid is None and pos_embed.shape[1] == own["pos_embed"].shape[1]:
            grid = model.config.grid
        if grid is None:  # the files of others have square grids
            grid = (math.isqrt(pos_embed.shape[1]),) * 2
            if cls_token is not None and pos_embed.shape[1] == math.prod(grid) + 1:  # DeiT: row 0 is the class token's
                state["cls_token"], pos_embed = cls_token + pos_embed[:, :1], pos_embed[:, 1:]
        if pos_embed.shape[1] == math.prod(grid):
            pos_embed = resize_pos_embed(pos_embed.float(), grid, model.config.grid).flatten(1, 2)
        state["pos_embed"] = pos_embed
    theirs, ours = ({key: value for key, value in part.items() if "head." in key} for part in (state, own))
    if {key: value.shape for key, value in theirs.items()} != {key: value.shape for key, value in ours.items()}:
        warnings.warn(f"{source} has another number of classes: the head stays as it was", stacklevel=2)
        state = {key: value for key, value in state.items() if key not in theirs} | ours

    wrong = {
        "missing": own.keys() - state.keys(),
        "unexpected": state.keys() - own.keys(),
        "of another shape": {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape},
    }
    named = "; ".join(f"{what}: {', '.join(sorted(keys))}" for what, keys in wrong.items() if keys)
    require(not named, f"{source} does not fit this model: {named}")
    model.load_state_dict(state)


def read_weights(source: str) -> tuple[dict[str, Tensor], tuple[int, int] | None]:
    """The tensors of a file, URL or released name, by name, and their grid where the file tells; for load_weights."""
    if source in ("convit_tiny", "convit_small", "convit_base"):
        source = f"https://dl.fbaipublicfiles.com/convit/{source}.pth"
    try:
        if source.startswith(("https://", "http://")):
            name = source.partition("://")[2].replace("/", "_")  # the whole address: hub caches by name alone
            state = torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True, file_name=name)
        else:
            state = torch.load(source, map_location="cpu", weights_only=True)
        grid = ConViTConfig(**state["model_config"]).grid if "model_config" in state else None  # our own files have it
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {source}, and no released model of that name") from None
    except Exception as error:  # an unpickler raises nearly anything on a bad file, and all of it means the same
        raise ValueError(f"{source} is out of reach, damaged, or nothing that torch.save wrote") from error
    state = state.get("model", state) if isinstance(state, dict) else None
    require(isinstance(state, dict) and any(map(torch.is_tensor, state.values())), f"{source} holds no weights")
    return {str(name): value for name, value in state.items() if torch.is_tensor(value)}, grid
