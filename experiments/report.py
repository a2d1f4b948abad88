"""Write results: NAME.md, NAME.json, and NAME.png in a folder, and the comparison of any runs.

The `cells` of a table map (row, column) to the summary of a setting: see `summarize_runs`.
"""

import json
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from analysis import uniform_non_locality
from training.checkpoint import provenance, write_text
from training.plots import plot_gates, plot_non_locality

RESULTS = Path("results/reproduce")
COLORS = ["#0072B2", "#D55E00", "#009E73"]  # Okabe and Ito's: safe for color-blind readers
MARKERS = "os^"
# fmt: off
PAPER = {  # top-1 accuracy on ImageNet: column names, and a tuple for each of the first rows of our table
    "sample-efficiency": (["ConViT-S", "DeiT-S"], [(47.8, 34.8), (59.6, 48.0), (73.7, 66.1), (81.4, 79.9)]),
    "ablation": (["ConViT-S+, 100%", "10%"], [(82.2, 59.7), (82.0, 57.4), (81.4, 56.9), (81.6, 54.6), (79.1, 47.8),
                                              (78.6, 54.3), (73.7, 44.8)]),
}
# fmt: on


def summarize_runs(records: list[dict]) -> dict:
    """Accuracy of the seeds of a setting after the last step, its mean and std (None for one seed), and its curve."""
    histories = [record["metrics"] for record in records]
    accuracy = [history[-1]["test_accuracy"] for history in histories]
    return {
        "runs": [record["name"] for record in records],
        "accuracy": accuracy,
        "mean": mean(accuracy),
        "std": stdev(accuracy) if len(accuracy) > 1 else None,
        "steps": [row["step"] for row in histories[0]],
        "curve": [mean(row["test_accuracy"] for row in rows) for rows in zip(*histories, strict=True)],
    }


def format_mean_std(cell: dict) -> str:
    """mean ± std (number of seeds); the mean alone for a single seed."""
    std = "" if cell["std"] is None else f" ± {cell['std']:.1f} ({len(cell['accuracy'])})"
    return f"{cell['mean']:.1f}{std}"


def summarize_heads(rows: list[dict]) -> dict:
    """Mean gate (NaN for a plain ViT) and non-locality of the GPSA heads in rows of metrics; heads with gate < 0.5."""
    gates, distances = (np.array([row["heads"][key] for row in rows], dtype=float) for key in ("gate", "non_locality"))
    gated = ~np.isnan(gates)
    if not gated.any():
        return {"mean_gate": np.nan}
    content_heads = (gates[gated] < 0.5).sum() / len(rows)
    return {"mean_gate": gates[gated].mean(), "non_locality": distances[gated].mean(), "content_heads": content_heads}


def write_table(name: str, records: dict[tuple[str, str], list[dict]], file: Path) -> dict[tuple[str, str], dict]:
    """Write a table from the runs of each cell, one per seed; return the cells."""
    cells = {cell: summarize_runs(runs) for cell, runs in records.items()}
    runs = [run for cell_runs in records.values() for run in cell_runs]
    config = runs[0]["config"]
    steps = " or ".join(str(count) for count in sorted({cell["steps"][-1] for cell in cells.values()}))
    learning_rates = " or ".join(f"{lr:g}" for lr in sorted({run["config"]["lr"] for run in runs}))
    images = "a validation split of the training set" if config["val_fraction"] else "the test images"
    notes = [
        f"Accuracy (%) on {images} after the last step: mean ± std over seeds (n); one seed where there is no ±.",
        f"All runs: `{config['model']}`, {steps} steps of {config['batch_size']} images, "
        f"learning rate {learning_rates}.",
    ]
    paper_columns, extra = PAPER.get(name, ([], []))
    extra_columns = [f"paper: {column}" for column in paper_columns]
    if name == "exercise":
        for cell, cell_runs in records.items():
            cells[cell] |= summarize_heads([run["metrics"][-1] for run in cell_runs])
        extra_columns = ["mean gate", "non-locality", "content-dominated heads (gate < 0.5)"]
        keys = {"mean_gate": ".2f", "non_locality": ".2f", "content_heads": ".1f"}
        extra = [[f"{cell[key]:{style}}" for key, style in keys.items()] for cell in cells.values()]
        notes.append("Heads of the GPSA layers, mean over seeds; non-locality: mean attention distance in patches.")
    lines = [*table_lines(name.replace("-", " "), cells, extra_columns, extra), "", *notes]
    record = {"cells": [{"row": row, "column": column} | cell for (row, column), cell in cells.items()]}
    save(file, record, lines, runs, PLOTS[name](cells))
    return cells


def table_lines(corner: str, cells: dict, extra_columns=(), extra=()) -> list[str]:
    """The lines of a table of means and standard deviations; `extra` has further values of its first rows."""
    rows, columns = row_col_labels(cells)
    table = [[row, *(format_mean_std(cells[row, column]) for column in columns)] for row in rows]
    for line, values in zip(table, extra, strict=False):
        line += map(str, values)
    return markdown([corner, *columns, *extra_columns], table)


def write_gates(
    run: str,
    metrics: list[dict],
    grid: tuple[int, int],
    maps: dict[str, tuple[Tensor, Tensor]],
    device: torch.device,
    folder: Path,
):
    """Write gates and non-locality of a run over training, and plot the attention maps of its heads.

    `maps`: the gates (l h) and attention maps (l h Y X) of the GPSA layers, by epoch.
    """
    uniform, first, last, table = uniform_non_locality(grid), metrics[0], metrics[-1], []
    for layer, gate in enumerate(last["heads"]["gate"]):
        has_gates = gate[0] is not None
        values = [mean(first["heads"]["gate"][layer]), mean(gate), min(gate)] if has_gates else []
        distances = [mean(row["heads"]["non_locality"][layer]) for row in (first, last)]
        cells = [f"{value:.2f}" for value in values] or [""] * 3
        table.append([str(layer + 1), *cells, *(f"{distance:.2f}" for distance in distances)])
    before, after = (f"epoch {row['epoch']}" for row in (first, last))
    header = ["layer", f"mean gate, {before}", after, f"lowest gate, {after}", f"non-locality, {before}", after]
    lines = [
        *markdown(header, table),
        "",
        f"Run `{run}`. Gate 1: position map only; gate 0: content map only. Non-locality: mean attention distance in "
        f"patches; {uniform:.2f} for uniform attention.",
    ]
    heads = [{key: row["heads"][key] for key in ("gate", "non_locality")} for row in metrics]
    record = {"run": run, "uniform": uniform, "epochs": [row["epoch"] for row in metrics], "heads": heads}
    save(folder / "gates", record, lines, [{"provenance": [provenance(device)]}], plot_heads(metrics, uniform, maps))


def write_masking(
    run: str, without_pos_embed: float, curves: dict[str, list[float]], device: torch.device, folder: Path
):
    """Write the accuracy of a run's model without its position embedding, and with parts of its GPSA layers masked.

    `curves`: the accuracy with "content" or "position" masked in the first 0, 1, 2 ... GPSA layers.
    """
    cells = {
        (str(count), f"{part} masked"): {"mean": accuracy, "std": None}
        for part, values in curves.items()
        for count, accuracy in enumerate(values)
    }
    lines = [
        *table_lines("masked GPSA layers", cells),
        "",
        f"Test accuracy (%) of run `{run}` with content or position masked in its first GPSA layers, without "
        f"retraining. Without the position embedding: {without_pos_embed:.1f}.",
        "Paper (ConViT-Ti, ImageNet): 73.1, and 67.1 without the position embedding; with content masked in the first "
        "3, 5 and 10 layers 62.3, 35.0 and 1.3; with position masked 63.5, 53.1 and 46.8.",
    ]
    record = {"run": run, "position_embedding_masked": without_pos_embed, "masked_in_first_layers": curves}
    figure = plot_lines(cells, "masked GPSA layers, from the first", "test accuracy (%)")
    figure.axes[0].axhline(without_pos_embed, color="gray", linestyle="--", label="position embedding masked")
    figure.axes[0].set_ylim(0)
    figure.axes[0].legend(frameon=False)
    save(folder / "masking", record, lines, [{"provenance": [provenance(device)]}], figure)


def compare(runs: list[dict], folder: Path):
    """Write a table of runs and a plot of their accuracy and mean gate: README.md and compare.png in `folder`."""
    images = "validation" if runs[0]["config"].get("val_fraction") else "test"
    figure, table = Figure(figsize=(9, 3.2), layout="constrained"), []
    accuracy, gate = figure.subplots(1, 2)
    for run in runs:
        epochs, values = ([row[key] for row in run["metrics"]] for key in ("epoch", "test_accuracy"))
        gates = [summarize_heads([row])["mean_gate"] for row in run["metrics"]]
        accuracy.plot(epochs, values, "o-", markersize=4, label=run["name"])
        gate.plot(epochs, gates, "o-", markersize=4)
        last_gate = "" if np.isnan(gates[-1]) else f"{gates[-1]:.2f}"
        command = f"`{run['provenance'][0]['command']}`"
        table.append([run["name"], f"{values[-1]:.1f}", str(epochs[-1]), last_gate, command])
    accuracy.set(xlabel="epoch", ylabel=f"{images} accuracy (%)")
    gate.set(xlabel="epoch", ylabel="mean gate (0: content, 1: position)", ylim=(0, 1.03))
    accuracy.locator_params(axis="x", integer=True)
    gate.locator_params(axis="x", integer=True)
    accuracy.legend(frameon=False, fontsize="small")
    figure.savefig(folder / "compare.png", dpi=120)

    header = ["run", f"{images} accuracy after the last epoch (%)", "epochs", "mean gate", "command"]
    summary = provenance_summary(runs)
    notes = f"One seed each; {'; '.join(summary['hardware'])}. Table and plot: `{summary['command']}`."
    lines = [*markdown(header, table), "", notes, "", "![accuracy and mean gate over epochs](compare.png)"]
    write_text(folder / "README.md", "\n".join(lines) + "\n")


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def provenance_summary(runs: list[dict]) -> dict:
    """The command that is running, and the distinct machines and versions of some runs."""
    keys = ("device", "cpu", "machine", "python", "torch", "torchvision")
    entries = [entry for run in runs for entry in run["provenance"]]
    hardware = sorted({", ".join(f"{key}: {entry[key]}" for key in keys if entry.get(key)) for entry in entries})
    return {"command": provenance(torch.device("cpu"))["command"], "hardware": hardware}


def save(file: Path, record: dict, lines: list[str], runs: list[dict], figure: Figure):
    """Write FILE.md, FILE.json, and FILE.png for a result, with the provenance of its runs; print the table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    record = provenance_summary(runs) | record
    text = "\n".join([*lines, f"`{record['command']}`; {'; '.join(record['hardware'])}."])
    write_text(file.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_text(file.with_suffix(".md"), f"{text}\n\n![same data as a plot]({file.name}.png)\n")
    figure.savefig(file.with_suffix(".png"), dpi=120)
    print(f"\n{text}\n\n{file}.md, .json, .png", flush=True)


def plot_lines(cells: dict, xlabel: str, ylabel: str) -> Figure:
    """Accuracy over rows, one line per column."""
    rows, columns = row_col_labels(cells)
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for column, color, marker in zip(columns, COLORS, MARKERS, strict=False):
        axes.errorbar(rows, *column_values(cells, column), color=color, marker=marker, capsize=4, label=column)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(frameon=False)
    return figure


def plot_ablation(cells: dict) -> Figure:
    """Accuracy of every row, one panel per column; the dashed line marks the first row."""
    rows, columns = row_col_labels(cells)
    figure = Figure(figsize=(9, 1 + 0.32 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    for axes, column in zip(panels, columns, strict=True):
        means, stds = column_values(cells, column)
        axes.errorbar(means, rows, xerr=stds, color=COLORS[0], marker="o", linestyle="", capsize=4)
        axes.axvline(means[0], color="gray", linestyle="--", linewidth=1)
        axes.set(title=f"{column} of the training images" if len(columns) > 1 else "", xlabel="test accuracy (%)")
    panels[0].invert_yaxis()
    return figure


def plot_locality(cells: dict) -> Figure:
    """Accuracy over steps, one panel per column, one line per row; the first row, without GPSA, is dashed."""
    rows, columns = row_col_labels(cells)
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    colors = ["gray", *colormaps["viridis"](np.linspace(0.8, 0.1, len(rows) - 1))]
    for axes, column in zip(panels, columns, strict=True):
        for row, color, style in zip(rows, colors, ["--", *["-"] * len(rows)], strict=False):
            cell = cells[row, column]
            axes.plot(cell["steps"], cell["curve"], style, color=color, marker=".", label=row)
        axes.set(title=column, xlabel="step")
    panels[0].set_ylabel("test accuracy (%)")
    panels[-1].legend(frameon=False)
    return figure


def plot_heads(metrics: list[dict], uniform: float, maps: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    """Gates and non-locality over training (Figs. 6 and 5), then the attention map of every head at each epoch."""
    layers, heads = next(iter(maps.values()))[0].shape
    figure = Figure(figsize=(11, 6.2 + 0.6 * layers), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=[2.6, 2.8, 0.8 + 0.6 * layers])
    plot_gates(metrics, top)
    plot_non_locality(metrics, uniform, middle)
    for axes, (epoch, (gate, attention)) in zip(bottom.subplots(1, len(maps)), maps.items(), strict=True):
        height, width = attention.shape[2:]
        tiles = np.full((layers, height + 1, heads, width + 1), np.nan)  # with a gap below and right of every map
        peak = attention.amax(dim=(2, 3), keepdim=True)  # each map has its own scale, so that flat ones are visible
        tiles[:, :height, :, :width] = (attention / peak).permute(0, 2, 1, 3).numpy()
        axes.imshow(tiles.reshape(layers * (height + 1), heads * (width + 1)), vmin=0)
        for layer, head in np.ndindex(layers, heads):
            corner = head * (width + 1) - 0.3, (layer + 1) * (height + 1) - 1.8
            axes.text(*corner, f"{gate[layer, head]:.2f}", color="white", fontsize=5)
        axes.set_yticks(np.arange(layers) * (height + 1) + (height - 1) / 2, [f"layer {n + 1}" for n in range(layers)])
        axes.set(title=f"attention of the center patch, {epoch}", xticks=[], frame_on=False)
        axes.tick_params(length=0)
    return figure


def column_values(cells: dict, column: str) -> tuple[list[float], list[float]]:
    """Means and standard deviations of a column; NaN, which draws no error bar, for a single seed."""
    selected = [cell for (_, name), cell in cells.items() if name == column]
    return [cell["mean"] for cell in selected], [cell["std"] or np.nan for cell in selected]


def row_col_labels(cells: dict) -> tuple[list[str], list[str]]:
    """The labels of rows and of columns, in order."""
    return list(dict.fromkeys(row for row, _ in cells)), list(dict.fromkeys(column for _, column in cells))


PLOTS = {
    "learning-rate": lambda cells: plot_lines(cells, "learning rate", "validation accuracy (%)"),
    "sample-efficiency": lambda cells: plot_lines(cells, "fraction of the training images", "test accuracy (%)"),
    "ablation": plot_ablation,
    "exercise": plot_ablation,
    "locality": plot_locality,
}
