"""Speed and memory of ConViT against its peers, side by side in one run.

    python benchmark.py                                       a CPU: about 15 minutes on two cores
    python benchmark.py --dtype bf16                          the same in mixed precision
    python benchmark.py --device cuda --dtype bf16 --compile  a GPU
    python benchmark.py --quick                               one model, a few repetitions, to see that it works

The variants take turns, so that a slow moment of the machine hits all of them, and each figure is a median. Compare the
ratios within a table; images/s only on one machine. "of peak" is the FLOP/s that the model needs by its equations, as a
share of what a large matrix product reaches in the same run (on a GPU: the MFU, with a measured peak). Memory is what
two training steps add to a fresh process. Writes results/benchmark-DEVICE-DTYPE[-compiled].{json,md,png}.
"""

import argparse
import json
import os
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from convit_min import GPSA, MODELS, ConViT, ConViTConfig
from training.checkpoint import provenance

try:
    import timm
    from timm.models.convit import ConVit as TimmConViT
    from timm.models.vision_transformer import VisionTransformer as TimmViT
except ImportError:
    timm = None

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS, EXPLICIT, TIMM_CONVIT = "ours", "ours, explicit maps", "timm ConViT"
TIMM_VIT, OUR_VIT = "timm ViT, same shape", "ours, gpsa_layers=0"
VARIANTS = [OURS, EXPLICIT, TIMM_CONVIT, TIMM_VIT, OUR_VIT]
PRESENT = [variant for variant in VARIANTS if timm or not variant.startswith("timm")]
PLAIN = TIMM_VIT if timm else OUR_VIT  # what all ratios are against
CPU_BATCH = {"convit_tiny": 16, "convit_small": 8, "convit_cifar_nano": 64, "convit_cifar": 64}
GPU_BATCH = {"convit_tiny": 256, "convit_small": 256, "convit_base": 128, "convit_cifar": 1024}


class ExplicitGPSA(GPSA):
    """GPSA by the textbook: an n x n position map for every head, a softmax, the mix, then the values."""

    def forward(self, x: Tensor, return_attention: bool = False) -> tuple[Tensor, None]:
        _, height, width, _ = x.shape
        q, k = rearrange(self.qk(x), "b Y X (two h d) -> two b h (Y X) d", two=2, h=self.num_heads)
        v = rearrange(self.v(x), "b Y X (h d) -> b h (Y X) d", h=self.num_heads)
        rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        place = torch.cartesian_prod(rows, columns).flip(1).float()
        offset = place[None, :] - place[:, None]
        r = torch.cat([offset, offset.square().sum(dim=-1, keepdim=True)], dim=-1)
        position = rearrange(self.pos_proj(r), "n m h -> h n m").softmax(dim=-1)
        content = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        gate = self.gating_param.sigmoid()[:, None, None]
        mixed = ((1 - gate) * content + gate * position).to(v.dtype)
        return self.proj(rearrange(mixed @ v, "b h (Y X) d -> b Y X (h d)", Y=height)), None


def build(variant: str, config: ConViTConfig) -> nn.Module:
    """The model of one row, in the shape of `config`."""
    if variant in (OURS, EXPLICIT, OUR_VIT):
        model = ConViT(replace(config, gpsa_layers=0) if variant == OUR_VIT else config)
        for block in model.blocks[: config.gpsa_layers] if variant == EXPLICIT else []:
            block.attn.__class__ = ExplicitGPSA
        return model
    shape = {name: getattr(config, name) for name in ("img_size", "patch_size", "num_classes", "depth", "num_heads")}
    shape |= {"mlp_ratio": config.mlp_ratio, "qkv_bias": False}
    if variant == TIMM_VIT:
        return TimmViT(**shape, embed_dim=config.dim)
    head_width = config.dim // config.num_heads  # timm's ConViT multiplies its embed_dim by the number of heads
    return TimmConViT(**shape, embed_dim=head_width, local_up_to_layer=config.gpsa_layers)


class Contestant:
    """A model with all it takes to run one inference or one training step of it."""

    def __init__(self, variant: str, config: ConViTConfig, batch: int, device: str, dtype: str, compiled: bool):
        torch.manual_seed(0)
        self.model = build(variant, config).to(device)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.images = torch.randn(batch, config.in_chans, *config.image_shape, device=device)
        self.labels = torch.randint(0, config.num_classes, (batch,), device=device)
        self.autocast = partial(torch.autocast, device, DTYPES[dtype], enabled=dtype != "fp32")

    def infer(self):
        self.model.eval()
        with torch.inference_mode(), self.autocast():
            self.forward(self.images)

    def train(self):
        self.model.train()
        with self.autocast():
            loss = F.cross_entropy(self.forward(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def interleaved(actions: dict, device: str, repetitions: int) -> dict[str, float]:
    """Median seconds of every action, the actions taking turns, after two rounds of warm-up."""
    taken = {name: [] for name in actions}
    for _ in range(repetitions + 2):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if device == "cuda":
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(durations[2:]) for name, durations in taken.items()}


def peak_memory(variant: str, config: ConViTConfig, batch: int, device: str, dtype: str, compiled: bool) -> float:
    """MiB that building a model and two training steps add, by CUDA's counter or to this process's resident peak."""

    def peak() -> int:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() // 1024
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    torch.zeros(1, device=device)
    before = peak()
    contestant = Contestant(variant, config, batch, device, dtype, compiled)
    contestant.train()
    contestant.train()
    return (peak() - before) / 1024


def in_fresh_process(function, *arguments):
    """Call it in a new process, whose peak memory is all its own.

    There malloc gives a freed tensor back at once: else what it keeps for later blurs the peak by a tenth.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def matmul_flops(device: str, dtype: str) -> float:
    """FLOP/s of a large matrix product, in the better of its two layouts: what the machine gives at best."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    seconds = interleaved({"product": lambda: a @ b, "transposed": lambda: a @ b.mT}, device, 9)
    return 2 * size**3 / min(seconds.values())


def forward_flops(variant: str, config: ConViTConfig) -> int:
    """FLOPs of one image, a multiply-add counted as two: of the plain ViT, or of ConViT in its cheapest form."""
    model = build(OUR_VIT if variant in (TIMM_VIT, OUR_VIT) else OURS, config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(1, config.in_chans, *config.image_shape))
    return counter.get_total_flops()


def compare(name: str, config: ConViTConfig, batch: int, args: argparse.Namespace, limit: float) -> list[dict]:
    """The rows of one model at one size."""
    setting = (config, batch, args.device, args.dtype, args.compile)
    contestants = {variant: Contestant(variant, *setting) for variant in PRESENT}
    seconds = {
        mode: interleaved({v: getattr(c, mode) for v, c in contestants.items()}, args.device, args.repetitions)
        for mode in ("infer", "train")
    }
    del contestants
    memory = {variant: in_fresh_process(peak_memory, variant, *setting) for variant in PRESENT}
    rows = []
    for variant in PRESENT:
        row = {"model": name, "size": config.image_shape[1], "batch": batch, "variant": variant}
        for mode, passes in (("infer", 1), ("train", 3)):  # the backward pass counts twice the forward one
            speed = batch / seconds[mode][variant]
            row[mode] = {
                "images_per_second": speed,
                "ratio": seconds[mode][PLAIN] / seconds[mode][variant],
                "of_peak": speed * passes * forward_flops(variant, config) / limit,
            }
        row["memory"] = {"mib": memory[variant], "ratio": memory[variant] / memory[PLAIN]}
        rows.append(row)
    return rows


def scaling(sizes: list[int], args: argparse.Namespace) -> list[dict]:
    """Time and memory of a training step of one image as the number of tokens grows, in the shape of convit_tiny."""
    rows = []
    for size in sizes:
        config = replace(MODELS["convit_tiny"], img_size=size)
        variants = [variant for variant in (OURS, TIMM_CONVIT, PLAIN) if variant in PRESENT]
        setting = (config, 1, args.device, args.dtype, args.compile)
        steps = {variant: Contestant(variant, *setting).train for variant in variants}
        seconds = interleaved(steps, args.device, args.repetitions)
        del steps
        for variant in variants:
            memory = in_fresh_process(peak_memory, variant, *setting)
            row = {"size": size, "tokens": config.grid[0] * config.grid[1], "variant": variant}
            rows.append(row | {"seconds": seconds[variant], "memory_mib": memory})
    return rows


def draw_scaling(rows: list[dict]) -> Figure:
    """Seconds and memory of a training step over the number of tokens."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    time_panel, memory_panel = figure.subplots(1, 2)
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        tokens = [row["tokens"] for row in own]
        time_panel.plot(tokens, [row["seconds"] for row in own], "o-", label=variant)
        memory_panel.plot(tokens, [row["memory_mib"] for row in own], "o-")
    time_panel.set(ylabel="seconds")
    memory_panel.set(ylabel="peak memory (MiB)")
    for panel in (time_panel, memory_panel):
        panel.set(xlabel="tokens of the one image", ylim=(0, None))
    time_panel.legend(frameon=False)
    figure.suptitle("A training step in the shape of convit_tiny, 224 to 640 px")
    return figure


def table(rows: list[dict]) -> str:
    """The rows as Markdown, one line for each variant, measured or not."""
    head = "| model | px | batch | | inference img/s | ratio | of peak | train img/s | ratio | of peak | MiB | ratio |"
    lines = [head, "|" + "---|" * 12]
    lines += [f"| | | | {variant} | not installed |" + " |" * 7 for variant in VARIANTS if variant not in PRESENT]
    for row in rows:
        cells = [row["model"], row["size"], row["batch"], row["variant"]]
        for mode in ("infer", "train"):
            speed = row[mode]
            cells += [f"{speed['images_per_second']:.1f}", f"**{speed['ratio']:.2f}**", f"{speed['of_peak']:.0%}"]
        cells += [f"{row['memory']['mib']:.0f}", f"**{row['memory']['ratio']:.2f}**"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help="names in convit_min.MODELS")
    parser.add_argument("--sizes", help="sides of the pictures in pixels, as in 224,384 (default: each model's own)")
    parser.add_argument("--batch-size", type=int, help="pictures a step (default: what suits the device)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 is autocast (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile every variant")
    parser.add_argument("--quick", action="store_true", help="the nano model in small batches, and no scaling curve")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder to write (default: %(default)s)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device on this machine")
    args.repetitions = 3 if args.quick else 9
    batches = GPU_BATCH if args.device == "cuda" else CPU_BATCH
    if args.quick:
        batches = {"convit_cifar_nano": 8}
    try:
        jobs = [
            (name, replace(MODELS[name], img_size=int(size) if size else MODELS[name].img_size))
            for name in args.models or batches
            for size in (args.sizes.split(",") if args.sizes else [None])
        ]
    except ValueError as error:
        parser.error(f"--sizes {args.sizes}: {error}")

    limit = matmul_flops(args.device, args.dtype)
    header = provenance(torch.device(args.device)) | {
        "timm": timm.__version__ if timm else "not installed",
        "matrix_product": f"{limit / 1e9:.0f} GFLOP/s",
        "repetitions": args.repetitions,
    }
    rows = []
    for name, config in jobs:
        rows += compare(name, config, args.batch_size or batches.get(name, 8), args, limit)
        print(table(rows[-len(PRESENT) :]), flush=True)
    curve = [] if args.quick else scaling([224, 320, 448, 640], args)

    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"benchmark-{args.device}-{args.dtype}{'-compiled' if args.compile else ''}"
    written = {"header": header, "rows": rows, "scaling": curve}
    (args.out / f"{stem}.json").write_text(json.dumps(written, indent=1) + "\n")
    described = ", ".join(f"{key}: {value}" for key, value in header.items())
    (args.out / f"{stem}.md").write_text(f"{described}\n\n{table(rows)}")
    if curve:
        draw_scaling(curve).savefig(args.out / f"{stem}.png", dpi=120)
    print(f"written: {args.out / stem}.json and .md")


if __name__ == "__main__":
    main()
