"""Speed and memory of ConViT, timm's ConViT and plain ViTs of the same shape, compared in one run.

    python -m benchmarks.model --device cpu                  10 to 15 minutes on two cores
    python -m benchmarks.model --device cpu --dtype bf16     mixed precision
    python -m benchmarks.model --device cuda --dtype bf16    GPU: two minutes on an H100; --compile takes longer
    python -m benchmarks.model --quick                       smoke test: one small model, few repetitions

All variants of a model take turns. Compare ratios within one table; images/s depend on the machine. "of peak" is the
model FLOP/s as a fraction of the FLOP/s of a large matrix product in the same run (on a GPU: the MFU, with a measured
peak). Memory is how much a model and two training steps raise the peak of a process. Needs requirements-dev.txt.
Writes results/benchmarks/model-DEVICE-DTYPE[-compiled].{json,md,png}.
"""

import gc
import math
import os
import resource
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import timm
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

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATCH_SIZES = {
    "cpu": {"convit_tiny": 16, "convit_small": 8, "convit_cifar_nano": 64, "convit_cifar": 64},
    "cuda": {"convit_tiny": 256, "convit_small": 256, "convit_base": 128, "convit_cifar": 1024},
}
SCALING_SIZES = [224, 320, 448, 640]  # pixels
TOKENS_PER_GIB = 500  # per scaling step on a GPU: timm's ConViT at 640 px then takes just over half of the memory
TABLE_HEADER = """\
| model | px | batch | variant | inference img/s | ratio | of peak | training img/s | ratio | of peak | MiB | ratio |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""
TABLE_ROW = (
    "| {model} | {size} | {batch} | {variant} "
    "| {infer[images_per_second]:.1f} | **{infer[ratio]:.2f}** | {infer[of_peak]:.0%} "
    "| {train[images_per_second]:.1f} | **{train[ratio]:.2f}** | {train[of_peak]:.0%} "
    "| {memory[mib]:.0f} | **{memory[ratio]:.2f}** |\n"
)


class ExplicitGPSA(GPSA):
    """GPSA that computes the n x n map A of every head and multiplies it by v.

    It does not use `attention_maps`, whose float32 maps are for inspection and would be an unfair handicap.
    """

    def forward(self, x: Tensor, grid: tuple[int, int], return_attention: bool = False) -> tuple[Tensor, None]:
        q, k = rearrange(self.qk(x), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        v = rearrange(self.v(x), "b n (h d) -> b h n d", h=self.num_heads)
        content = (q.shape[-1] ** -0.5 * q @ k.mT).softmax(dim=-1)
        position = einsum(*self.position_factors(grid), "h Y y, h X x -> h Y X y x").flatten(3).flatten(1, 2)
        out = self.mix(content, position.to(content.dtype)).to(v.dtype) @ v
        return self.proj(rearrange(out, "b h n d -> b n (h d)")), None


def explicit_convit(config: ConViTConfig) -> ConViT:
    model = ConViT(config)
    for index in config.gpsa_blocks:
        model.blocks[index].attn.__class__ = ExplicitGPSA
    return model


def timm_model(name: str, config: ConViTConfig, **options) -> nn.Module:
    fields = ["img_size", "patch_size", "in_chans", "num_classes", "depth", "num_heads", "mlp_ratio", "qkv_bias"]
    return timm.create_model(name, **{field: getattr(config, field) for field in fields}, **options)


VARIANTS = {  # what builds a model in the shape of a config; timm's ConViT multiplies embed_dim by the number of heads
    "ours": ConViT,
    "ours, explicit maps": explicit_convit,
    "timm ConViT": lambda config: timm_model(
        "convit_tiny", config, embed_dim=config.dim // config.num_heads, local_up_to_layer=config.gpsa_layers
    ),
    "timm ViT, same shape": lambda config: timm_model("vit_tiny_patch16_224", config, embed_dim=config.dim),
    "ours, gpsa_layers=0": lambda config: ConViT(replace(config, gpsa_layers=0)),
}
BASELINE = "timm ViT, same shape"  # all ratios are relative to it
PLAIN = (BASELINE, "ours, gpsa_layers=0")
SCALING_VARIANTS = ["ours", "timm ConViT", BASELINE]


def training_and_inference(variant: str, config: ConViTConfig, batch_size: int, args) -> dict[str, Callable]:
    """Functions "train" and "infer": one step of a variant on a random batch, as the command-line `args` say."""
    torch.manual_seed(0)
    model = VARIANTS[variant](config).to(args.device)
    # fullgraph: raises an error where torch.compile would silently fall back to eager mode
    forward = torch.compile(model, fullgraph=True) if args.compile else model
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randn(batch_size, config.in_chans, *config.image_shape, device=args.device)
    labels = torch.randint(0, config.num_classes, (batch_size,), device=args.device)
    autocast = partial(torch.autocast, args.device, DTYPES[args.dtype], enabled=args.dtype != "fp32")

    def train():
        model.train()
        with autocast():
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def infer():
        model.eval()
        with torch.inference_mode(), autocast():
            forward(images)

    # in this order, since timm's ConViT caches a tensor that inference_mode would make useless for training
    return {"train": train, "infer": infer}


def peak_memory(device: str) -> float:
    """Peak memory of this process so far in MiB: allocated on the GPU since the last reset, else resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def forget_models():
    """Free unused models and their compiled code, which would count toward torch.compile's recompile limit."""
    torch.compiler.reset()
    gc.collect()  # compiled models are in reference cycles


def training_memory(variant: str, config: ConViTConfig, batch_size: int, args) -> float:
    """MiB that a model and two training steps add to the peak memory of this process."""
    before = peak_memory(args.device)
    train = training_and_inference(variant, config, batch_size, args)["train"]
    train()
    train()
    return peak_memory(args.device) - before


def matmul_flops(args) -> float:
    """FLOP/s of a large matrix product, with or without a transposed factor, whichever is faster."""
    size = 8192 if args.device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=args.device, dtype=DTYPES[args.dtype])
    seconds = time_interleaved({"product": lambda: a @ b, "transposed": lambda: a @ b.mT}, args.repetitions)
    return 2 * size**3 / min(seconds.values())


def forward_flops(config: ConViTConfig) -> int:
    """FLOPs of one image in our model, a multiply-add counted as two."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.device("meta"):
        ConViT(config)(torch.empty(1, config.in_chans, *config.image_shape))
    return counter.get_total_flops()


def compare(name: str, config: ConViTConfig, batch_size: int, variants: Iterable[str], args) -> list[dict]:
    """Speed and memory of one model at one image size, a table row per variant."""
    steps = {variant: training_and_inference(variant, config, batch_size, args) for variant in variants}
    seconds = {
        mode: time_interleaved({variant: steps[variant][mode] for variant in variants}, args.repetitions)
        for mode in ("train", "infer")
    }
    del steps
    forget_models()

    memory, rows = {}, []
    for variant in variants:
        measure = partial(training_memory, variant, config, batch_size, args)
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            memory[variant] = measure()
            forget_models()
        else:  # each in a new process; Linux would let a spawned one begin at the peak of this one
            os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc then frees tensors at once; else the peak varies
            with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
                memory[variant] = pool.submit(measure).result()
    for variant in variants:
        row = {"model": name, "size": config.image_shape[1], "tokens": math.prod(config.grid)}
        row |= {"batch": batch_size, "variant": variant}
        flops = forward_flops(replace(config, gpsa_layers=0) if variant in PLAIN else config)
        for mode, passes in (("infer", 1), ("train", 3)):  # a backward pass costs two forward passes
            speed, ratio = batch_size / seconds[mode][variant], seconds[mode][BASELINE] / seconds[mode][variant]
            of_peak = speed * passes * flops / args.peak_flops
            row[mode] = {"images_per_second": speed, "ratio": ratio, "of_peak": of_peak}
        row["memory"] = {"mib": memory[variant], "ratio": memory[variant] / memory[BASELINE]}
        rows.append(row)
    print(f"{name}, {row['size']} px: done", flush=True)
    return rows


def plot_scaling(rows: list[dict]) -> Figure:
    """Time and memory per image of a training step over the number of tokens."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = {
        "ms per image": lambda row: 1000 / row["train"]["images_per_second"],
        "peak memory per image (MiB)": lambda row: row["memory"]["mib"] / row["batch"],
    }
    for axes, (label, value) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            points = [(row["tokens"], value(row)) for row in rows if row["variant"] == variant]
            axes.plot(*zip(*points, strict=True), "o-", label=variant)
        axes.set(xlabel="tokens per image", ylabel=label, ylim=(0, None))
    figure.axes[0].legend(frameon=False)
    figure.suptitle(f"Training step of convit_tiny, {rows[0]['size']} to {rows[-1]['size']} px")
    return figure


def main():
    parser = benchmark_parser("model", __doc__)
    parser.add_argument("--device", choices=BATCH_SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="NAME", help="names in convit_min.MODELS")
    parser.add_argument("--batch-size", type=int, help="images per step (default: per model, for a GPU of 80 GB)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16: autocast (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile all variants")
    parser.add_argument("--quick", action="store_true", help="smoke test: convit_cifar_nano only, no scaling plot")
    args = parser.parse_args()
    scaling_tokens = 1  # on a CPU, one image per step
    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: PyTorch finds no CUDA device")
        torch.set_float32_matmul_precision("high")  # TF32, as in training
        scaling_tokens = TOKENS_PER_GIB * torch.cuda.get_device_properties(0).total_memory // 2**30
    args.repetitions = 3 if args.quick else 9
    batch_sizes = {"convit_cifar_nano": 8} if args.quick else BATCH_SIZES[args.device]
    args.peak_flops = matmul_flops(args)
    header = provenance(torch.device(args.device)) | {
        "timm": timm.__version__,
        "matrix_product": f"{args.peak_flops / 1e9:.0f} GFLOP/s",
        "repetitions": args.repetitions,
    }
    rows, scaling = [], []
    for name in args.models or batch_sizes:
        rows += compare(name, MODELS[name], args.batch_size or batch_sizes.get(name, 8), VARIANTS, args)
    for size in [] if args.quick else SCALING_SIZES:
        config = replace(MODELS["convit_tiny"], img_size=size)
        batch_size = max(1, scaling_tokens // math.prod(config.grid))
        scaling += compare("convit_tiny", config, batch_size, SCALING_VARIANTS, args)
    stem = f"model-{args.device}-{args.dtype}{'-compiled' if args.compile else ''}"
    table = TABLE_HEADER + "".join(TABLE_ROW.format(**row) for row in rows + scaling)
    write_results(args.out, stem, header, table, {"rows": rows, "scaling": scaling})
    if scaling:
        plot_scaling(scaling).savefig(args.out / f"{stem}.png", dpi=120)


if __name__ == "__main__":
    main()
