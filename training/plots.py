"""The plots of a run, from its metrics: curves.png, gates.png, nonlocality.png."""

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure, FigureBase


def plot_run(metrics: list[dict], run_dir: Path, uniform_non_locality: float, eval_split: str = "test"):
    """Write all three plots into the run folder."""
    plot_curves(metrics, eval_split).savefig(run_dir / "curves.png", dpi=120)
    if np.isfinite(stack_heads(metrics, "gate")).any():
        plot_gates(metrics).savefig(run_dir / "gates.png", dpi=120)
    plot_non_locality(metrics, uniform_non_locality).savefig(run_dir / "nonlocality.png", dpi=120)


def plot_curves(metrics: list[dict], eval_split: str = "test") -> Figure:
    """Loss and accuracy over epochs."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in metrics]
    train_loss = [record["train_loss"] for record in metrics[1:]]
    loss.plot(epochs[1:], train_loss, label="training (augmented, smoothed labels)")
    loss.plot(epochs, [record["test_loss"] for record in metrics], label=eval_split)
    loss.set(xlabel="epoch", ylabel="cross-entropy")
    loss.legend(frameon=False)
    accuracy.plot(epochs, [record["test_accuracy"] for record in metrics], color="tab:orange")
    accuracy.set(xlabel="epoch", ylabel=f"{eval_split} accuracy (%)")
    return figure


def plot_gates(metrics: list[dict], figure: FigureBase | None = None) -> FigureBase:
    """The gate of every head over epochs, one panel per GPSA layer, the mean in black (Fig. 6 of the paper)."""
    epochs, gate = [record["epoch"] for record in metrics], stack_heads(metrics, "gate")
    layers = [layer for layer in range(gate.shape[1]) if np.isfinite(gate[:, layer]).all()]
    figure = figure or Figure(figsize=(1.2 + 1.9 * len(layers), 2.8), layout="constrained")
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for panel, layer in zip(panels, layers, strict=True):
        lines = panel.plot(epochs, gate[:, layer], linewidth=1)
        lines += panel.plot(epochs, gate[:, layer].mean(axis=1), color="black", linewidth=2)
        panel.set(title=f"layer {layer + 1}", xlabel="epoch", ylim=(0, 1))
    panels[0].set_ylabel("gate (0: content, 1: position)")
    names = [*(f"head {head + 1}" for head in range(gate.shape[2])), "mean"]
    figure.legend(lines, names, loc="outside right upper", frameon=False, fontsize="small")
    return figure


def plot_non_locality(metrics: list[dict], uniform: float, figure: FigureBase | None = None) -> FigureBase:
    """Mean attention distance of every layer over epochs, and that of uniform attention (Fig. 5 of the paper)."""
    epochs, distance = [record["epoch"] for record in metrics], stack_heads(metrics, "non_locality").mean(axis=2)
    figure = figure or Figure(figsize=(6, 3.6), layout="constrained")
    panel = figure.subplots()
    colors = colormaps["viridis"](np.linspace(0, 0.9, distance.shape[1]))
    for layer, color in enumerate(colors):
        panel.plot(epochs, distance[:, layer], color=color, label=f"layer {layer + 1}")
    panel.axhline(uniform, color="gray", linestyle="--", label="uniform attention")
    panel.set(xlabel="epoch", ylabel="non-locality (patches)", ylim=(0, None))
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def stack_heads(metrics: list[dict], name: str) -> np.ndarray:
    """A head statistic as epochs x layers x heads; NaN for self-attention layers."""
    return np.array([record["heads"][name] for record in metrics], dtype=float)
