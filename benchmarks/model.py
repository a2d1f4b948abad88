"""Speed and memory of ConViT, timm's ConViT and plain ViTs of the same shape, compared in one run.

    python -m benchmarks.model                                       CPU: about 15 minutes on two cores
    python -m benchmarks.model --dtype bf16                          mixed precision
    python -m benchmarks.model --device cuda --dtype bf16 --compile  GPU
    python -m benchmarks.model --quick                               smoke test: one small model, few repetitions

All variants of a model take turns. Compare ratios within one table; images/s depend on the machine. "of peak" is the
model FLOP/s as a fraction of the FLOP/s of a large matrix product in the same run (on a GPU: the MFU, with a measured
peak). Memory is what a model and two training steps add to the peak of a new process.
Writes results/benchmarks/model-DEVICE-DTYPE[-compiled].{json,md,png}.
"""

import argparse
import gc
import math
import os
import re
import resource
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import benchmark_parser, time_interleaved, write_results
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
VARIANTS = [OURS, EXPLICIT, TIMM_CONVIT, TIMM_VIT, OUR_VIT] if timm else [OURS, EXPLICIT, OUR_VIT]
BASELINE = TIMM_VIT if timm else OUR_VIT  # all ratios are relative to it
BATCH_SIZES = {
    "cpu": {"convit_tiny": 16, "convit_small": 8, "convit_cifar_nano": 64, "convit_cifar": 64},
    "cuda": {"convit_tiny": 256, "convit_small": 256, "convit_base": 128, "convit_cifar": 1024},
}
SCALING_SIZES = [224, 320, 448, 640]  # pixels
SCALING_VARIANTS = [OURS, TIMM_CONVIT, BASELINE] if timm else [OURS, BASELINE]
TOKENS_PER_GIB = 500  # per scaling step on a GPU: fills it, and timm's ConViT at 640 px (2.3 GiB per image) still fits


class ExplicitGPSA(GPSA):
    """GPSA that computes the n x n map A of every head and multiplies it by v.

    It does not use `attention_maps`, whose float64 scores are for inspection and would be an unfair handicap.
    """

    def forward(self, x: Tensor, grid: tuple[int, int], return_attention: bool = False) -> tuple[Tensor, None]:
        q, k = rearrange(self.qk(x), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        v = rearrange(self.v(x), "b n (h d) -> b h n d", h=self.num_heads)
        content = (q.shape[-1] ** -0.5 * q @ k.mT).softmax(dim=-1)
        position = einsum(*self.position_factors(grid), "h Y y, h X x -> h Y X y x").flatten(3).flatten(1, 2)
        out = self.mix(content, position.to(content.dtype)).to(v.dtype) @ v
        return self.proj(rearrange(out, "b h n d -> b n (h d)")), None


def build(variant: str, config: ConViTConfig) -> nn.Module:
    """The model of a variant, in the shape of `config`."""
    if variant in (OURS, EXPLICIT, OUR_VIT):
        model = ConViT(replace(config, gpsa_layers=0) if variant == OUR_VIT else config)
        for index in config.gpsa_blocks if variant == EXPLICIT else []:
            model.blocks[index].attn.__class__ = ExplicitGPSA
        return model
    fields = ["img_size", "patch_size", "in_chans", "num_classes", "depth", "num_heads", "mlp_ratio", "qkv_bias"]
    shape = {field: getattr(config, field) for field in fields}
    if variant == TIMM_VIT:
        return TimmViT(**shape, embed_dim=config.dim)
    head_dim = config.dim // config.num_heads  # timm's ConViT multiplies embed_dim by the number of heads
    return TimmConViT(**shape, embed_dim=head_dim, local_up_to_layer=config.gpsa_layers)


class BenchmarkCase:
    """A model, its optimizer and one random batch, for args.device, args.dtype and args.compile."""

    def __init__(self, variant: str, config: ConViTConfig, batch_size: int, args: argparse.Namespace):
        torch.manual_seed(0)
        device = args.device
        self.model = build(variant, config).to(device)
        # fullgraph: raises an error where torch.compile would silently fall back to eager mode
        self.forward = torch.compile(self.model, fullgraph=True) if args.compile else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.images = torch.randn(batch_size, config.in_chans, *config.image_shape, device=device)
        self.labels = torch.randint(0, config.num_classes, (batch_size,), device=device)
        self.autocast = partial(torch.autocast, device, DTYPES[args.dtype], enabled=args.dtype != "fp32")

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


def peak_memory(device: str) -> float:
    """Peak memory of this process so far in MiB: allocated on the GPU, else resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss begins at the peak of the parent process
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS: bytes


def training_memory(variant: str, config: ConViTConfig, batch_size: int, args: argparse.Namespace) -> float:
    """MiB that a model and two training steps add to the peak memory of this process."""
    before = peak_memory(args.device)
    case = BenchmarkCase(variant, config, batch_size, args)
    case.train()
    case.train()
    return peak_memory(args.device) - before


def run_in_new_process(function, *args):
    """Call a function in a new process, so that earlier work does not count towards its peak memory."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc returns freed tensors at once; else the peak varies by 10%
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def matmul_flops(device: str, dtype: str) -> float:
    """FLOP/s of a large matrix product, with or without a transposed factor, whichever is faster."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    seconds = time_interleaved({"product": lambda: a @ b, "transposed": lambda: a @ b.mT}, 9, device)
    return 2 * size**3 / min(seconds.values())


def forward_flops(variant: str, config: ConViTConfig) -> int:
    """FLOPs of one image, a multiply-add counted as two: of the plain ViT, or of ConViT in its cheapest form."""
    model = build(OUR_VIT if variant in (TIMM_VIT, OUR_VIT) else OURS, config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(1, config.in_chans, *config.image_shape))
    return counter.get_total_flops()


def compare(
    name: str, config: ConViTConfig, batch_size: int, variants: list[str], args: argparse.Namespace, peak_flops: float
) -> list[dict]:
    """Speed and memory of one model at one image size, a table row per variant."""
    cases = {variant: BenchmarkCase(variant, config, batch_size, args) for variant in variants}
    seconds = {}
    for mode in ("train", "infer"):  # timm's ConViT caches a tensor that inference_mode would make useless for training
        steps = {variant: getattr(case, mode) for variant, case in cases.items()}
        seconds[mode] = time_interleaved(steps, args.repetitions, args.device)
    del cases, steps
    torch.compiler.reset()  # later models would exceed the recompile limit
    gc.collect()  # compiled models are in reference cycles
    torch.cuda.empty_cache()  # the processes that measure memory need it
    memory = {variant: run_in_new_process(training_memory, variant, config, batch_size, args) for variant in variants}
    rows = []
    for variant in variants:
        row = {"model": name, "size": config.image_shape[1], "tokens": math.prod(config.grid)}
        row |= {"batch": batch_size, "variant": variant}
        for mode, passes in (("infer", 1), ("train", 3)):  # a backward pass costs two forward passes
            speed = batch_size / seconds[mode][variant]
            row[mode] = {
                "images_per_second": speed,
                "ratio": seconds[mode][BASELINE] / seconds[mode][variant],
                "of_peak": speed * passes * forward_flops(variant, config) / peak_flops,
            }
        row["memory"] = {"mib": memory[variant], "ratio": memory[variant] / memory[BASELINE]}
        rows.append(row)
    print(f"{name}, {row['size']} px: done", flush=True)
    return rows


def scaling_batch_size(config: ConViTConfig, device: str) -> int:
    """One image on a CPU; on a GPU, what fills it, with the same number of tokens at every image size."""
    if device == "cpu":
        return 1
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return max(1, int(TOKENS_PER_GIB * gib) // math.prod(config.grid))


def plot_scaling(rows: list[dict]) -> Figure:
    """Time and memory per image of a training step over the number of tokens."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for variant in dict.fromkeys(row["variant"] for row in rows):
        points = [row for row in rows if row["variant"] == variant]
        tokens = [row["tokens"] for row in points]
        time_axes.plot(tokens, [1000 / row["train"]["images_per_second"] for row in points], "o-", label=variant)
        memory_axes.plot(tokens, [row["memory"]["mib"] / row["batch"] for row in points], "o-")
    for axes, label in ((time_axes, "ms per image"), (memory_axes, "peak memory per image (MiB)")):
        axes.set(xlabel="tokens per image", ylabel=label, ylim=(0, None))
    time_axes.legend(frameon=False)
    figure.suptitle(f"Training step of convit_tiny, {rows[0]['size']} to {rows[-1]['size']} px")
    return figure


def markdown_table(rows: list[dict]) -> str:
    columns = "model | px | batch | variant | inference img/s | ratio | of peak | training img/s | ratio | of peak"
    lines = [f"| {columns} | MiB | ratio |", "|" + "---|" * 12]
    for row in rows:
        cells = [row["model"], row["size"], row["batch"], row["variant"]]
        for mode in ("infer", "train"):
            speed = row[mode]
            cells += [f"{speed['images_per_second']:.1f}", f"**{speed['ratio']:.2f}**", f"{speed['of_peak']:.0%}"]
        cells += [f"{row['memory']['mib']:.0f}", f"**{row['memory']['ratio']:.2f}**"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = benchmark_parser("model", __doc__)
    parser.add_argument("--device", choices=BATCH_SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help="names in convit_min.MODELS")
    parser.add_argument("--sizes", nargs="+", type=int, help="image sizes in pixels (default: the size of each model)")
    parser.add_argument("--batch-size", type=int, help="images per step (default: per model, for a GPU of 80 GB)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16: autocast (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile all variants")
    parser.add_argument("--quick", action="store_true", help="smoke test: convit_cifar_nano only, no scaling plot")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device")
    args.repetitions = 3 if args.quick else 9
    batch_sizes = {"convit_cifar_nano": 8} if args.quick else BATCH_SIZES[args.device]
    try:
        configs = [
            (name, replace(MODELS[name], img_size=size))
            for name in args.models or batch_sizes
            for size in args.sizes or [MODELS[name].img_size]
        ]
    except ValueError as error:
        parser.error(f"--sizes: {error}")

    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in training
    peak_flops = matmul_flops(args.device, args.dtype)
    header = provenance(torch.device(args.device)) | {
        "timm": timm.__version__ if timm else "not installed",
        "matrix_product": f"{peak_flops / 1e9:.0f} GFLOP/s",
        "repetitions": args.repetitions,
    }
    rows, scaling = [], []
    for name, config in configs:
        batch_size = args.batch_size or batch_sizes.get(name, 8)
        rows += compare(name, config, batch_size, VARIANTS, args, peak_flops)
    for size in [] if args.quick else SCALING_SIZES:
        config = replace(MODELS["convit_tiny"], img_size=size)
        batch_size = scaling_batch_size(config, args.device)
        scaling += compare("convit_tiny", config, batch_size, SCALING_VARIANTS, args, peak_flops)
    stem = f"model-{args.device}-{args.dtype}{'-compiled' if args.compile else ''}"
    write_results(args.out, stem, header, markdown_table(rows + scaling), {"rows": rows, "scaling": scaling})
    if scaling:
        plot_scaling(scaling).savefig(args.out / f"{stem}.png", dpi=120)


if __name__ == "__main__":
    main()
