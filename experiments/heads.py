"""The heads of one run: gates and attention maps over training, and the accuracy with content or position masked."""

import copy
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from analysis import gates, read_metrics, uniform_non_locality
from convit_min import ConViT
from experiments.report import COLORS, markdown, save
from train_cifar import Config
from training.data import InMemoryData
from training.distributed import UserError
from training.evaluation import evaluate, match_classes
from training.plots import plot_gates, plot_non_locality, stack_heads
from weights import open_model, snapshot_files


def load_run(
    run: Path, dataset: str | None, data_dir: str, needs_gates: bool = False
) -> tuple[list[ConViT], InMemoryData]:
    """The models of a run's first and last snapshot, and evaluation images.

    Raises UserError if their classes differ, or if there are no gates but they are needed.
    """
    files = snapshot_files(run)
    if not files:
        raise UserError(f"{run} has no snapshots; pass a run folder of train_cifar.py as --run")
    try:
        first, last = open_model(files[0]), open_model(files[-1])
    except ValueError as error:
        raise UserError(str(error)) from error
    if needs_gates and last.config.gpsa_layers == 0:
        raise UserError(f"{run} is a plain ViT: it has no gates")
    config = Config(dataset=dataset, data_dir=data_dir, img_size=last.config.img_size, batch_size=256, eval=True)
    config.model = run.name  # only to be printed
    data = InMemoryData(config, torch.device(config.device), last.crop_pct)
    data.test.labels = match_classes(last, data.classes, str(run)).to(data.device)[data.test.labels]
    return [first, last], data


@torch.no_grad()
def write_gates(run: Path, dataset: str | None, data_dir: str, out: Path):
    """Write gates and non-locality of a run over training, with attention maps of its first and last snapshot."""
    snapshots, data = load_run(run, dataset, data_dir, needs_gates=True)
    config, metrics = snapshots[-1].config, read_metrics(run)
    (height, width), maps = config.grid, {}
    for model in snapshots:
        attention = model(data.sample_images.cpu(), return_attention=True)[1][: config.gpsa_layers]
        center = torch.stack([layer.mixed[:, :, height // 2 * width + width // 2].mean(0) for layer in attention])
        maps[f"epoch {model.epoch}"] = gates(model)[: config.gpsa_layers], center.unflatten(2, (height, width))

    uniform, epochs = uniform_non_locality(config.grid), [row["epoch"] for row in metrics]
    gate, distance = (stack_heads(metrics, key) for key in ("gate", "non_locality"))  # epoch, layer, head
    columns = gate[0].mean(1), gate[-1].mean(1), gate[-1].min(1), distance[0].mean(1), distance[-1].mean(1)
    rows = [
        [str(layer), *("" if math.isnan(value) else f"{value:.2f}" for value in values)]
        for layer, values in enumerate(zip(*columns, strict=True), start=1)
    ]
    before, after = f"epoch {epochs[0]}", f"epoch {epochs[-1]}"
    header = ["layer", f"mean gate, {before}", after, f"lowest gate, {after}", f"non-locality, {before}", after]
    notes = (
        f"Run `{run.name}`. Gate 1: position map only; gate 0: content map only. Non-locality: mean attention distance "
        f"in patches; {uniform:.2f} for uniform attention. Plotted maps: mean over {len(data.sample_images)} images."
    )
    record, figure = {"run": run.name, "uniform": uniform}, plot_heads(metrics, uniform, maps)
    save(out / "gates", record, markdown(header, rows), notes, figure)


def plot_heads(metrics: list[dict], uniform: float, maps: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    """Gates and non-locality over training (Figs. 6 and 5), then the attention map of every head at each epoch.

    `maps`: the gates (l h) and attention maps (l h Y X) of the GPSA layers, by epoch.
    """
    layers, heads = next(iter(maps.values()))[0].shape
    figure = Figure(figsize=(11, 6.2 + 0.6 * layers), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=[2.6, 2.8, 0.8 + 0.6 * layers])
    plot_gates(metrics, top)
    plot_non_locality(metrics, uniform, middle)
    halves = bottom.subfigures(1, len(maps), squeeze=False)[0]
    for half, (epoch, (gate, attention)) in zip(halves, maps.items(), strict=True):
        half.suptitle(f"mean attention of the center patch, {epoch}")
        for (layer, head), axes in np.ndenumerate(half.subplots(layers, heads, squeeze=False)):
            axes.imshow(attention[layer, head].numpy(), vmin=0)  # to its own maximum: flat maps are visible, too
            axes.set_title(f"{gate[layer, head]:.2f}", fontsize=5)
            axes.set(xticks=[], yticks=[], ylabel="" if head else f"layer {layer + 1}")
    return figure


def masked(model: ConViT, pos_embed: bool = False, content: int = 0, position: int = 0) -> ConViT:
    """A copy of a model without its position embedding, or without content or position in its first layers."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        if pos_embed:
            model.pos_embed.zero_()
        for block in model.blocks[:content]:
            block.attn.gating_param.fill_(math.inf)  # a gate of exactly 1: position only
        for block in model.blocks[:position]:
            block.attn.gating_param.fill_(-math.inf)
    return model


def write_masking(run: Path, dataset: str | None, data_dir: str, out: Path):
    """Write the test accuracy of a run's last snapshot, unchanged and with parts of it masked."""
    (_, model), data = load_run(run, dataset, data_dir)

    def accuracy(**parts) -> float:
        print(".", end="", flush=True)
        masked_model = masked(model, **parts).to(data.device)
        return evaluate(masked_model, data.eval_batches(), data.device, "off")["test_accuracy"]

    unmasked, without_pos_embed = accuracy(), accuracy(pos_embed=True)
    counts = range(model.config.gpsa_layers + 1)
    curves = {part: [unmasked, *(accuracy(**{part: n}) for n in counts[1:])] for part in ("content", "position")}
    rows = [[str(n), *(f"{curve[n]:.1f}" for curve in curves.values())] for n in counts]
    name = f"{run.name}, epoch {model.epoch}"
    notes = (
        f"Test accuracy (%) of run `{name}` with content or position masked in its first GPSA layers, without "
        f"retraining. Without the position embedding: {without_pos_embed:.1f}.\n"
        "Paper (ConViT-Ti, ImageNet): 73.1, and 67.1 without the position embedding; with content masked in the first "
        "3, 5 and 10 layers 62.3, 35.0 and 1.3; with position masked 63.5, 53.1 and 46.8."
    )
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for (part, curve), color, marker in zip(curves.items(), COLORS.values(), "os", strict=True):
        axes.plot(counts, curve, color=color, marker=marker, label=f"{part} masked")
    axes.axhline(without_pos_embed, color="gray", linestyle="--", label="position embedding masked")
    axes.set(xlabel="masked GPSA layers, from the first", ylabel="test accuracy (%)", xticks=counts, ylim=(0, None))
    axes.legend(frameon=False)
    record = {"run": name, "position_embedding_masked": without_pos_embed, "masked_in_first_layers": curves}
    header = ["masked GPSA layers", "content masked", "position masked"]
    save(out / "masking", record, markdown(header, rows), notes, figure)
