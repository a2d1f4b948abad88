"""What reproduce.py and exercises.py write: of every result NAME.md, NAME.json and NAME.png in results/reproduce/.

A grid's `cells` are what came out, by (row, column) of its table: see `outcome`.
"""

import json
import shlex
import sys
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

from analysis import read_metrics, uniform_non_locality
from training.checkpoint import provenance, write
from training.plots import draw_gates, draw_non_locality

RESULTS = Path("results/reproduce")
KEPT = "what is finished is kept, and the same command goes on from there"
COLOURS = ["#0072B2", "#D55E00", "#009E73"]  # of Okabe and Ito: told apart with any kind of colour vision
MARKERS = "os^"
PAPER = {  # top-1 accuracy on ImageNet: names of columns, and a tuple for every row of our table
    "sample-efficiency": (["ConViT-S", "DeiT-S"], [(47.8, 34.8), (59.6, 48.0), (73.7, 66.1), (81.4, 79.9)]),
    "ablation": (
        ["ConViT-S+, 100%", "10%"],
        [(82.2, 59.7), (82.0, 57.4), (81.4, 56.9), (81.6, 54.6), (79.1, 47.8), (78.6, 54.3), (73.7, 44.8)],
    ),
}


def ended(run: Path) -> bool:
    """Whether a run has come to its last epoch; False where it has not even been measured once."""
    if not (run / "metrics.jsonl").exists():
        return False
    last = json.loads((run / "config.json").read_text())["epochs"]
    return any(line["epoch"] == last for line in read_metrics(run))


def outcome(runs: list[Path]) -> dict:
    """What the seeds of a setting came to: accuracy after the last step, its mean and spread, and the mean over steps.

    The spread is a standard deviation, None for one seed.
    """
    histories = [read_metrics(run) for run in runs]
    accuracy = [history[-1]["test_accuracy"] for history in histories]
    return {
        "runs": [run.name for run in runs],
        "accuracy": accuracy,
        "mean": mean(accuracy),
        "spread": stdev(accuracy) if len(accuracy) > 1 else None,
        "steps": [line["step"] for line in histories[0]],
        "curve": [mean(line["test_accuracy"] for line in lines) for lines in zip(*histories, strict=True)],
    }


def write_grid(folder: str, name: str, runs: dict[tuple[str, str], list[Path]]) -> dict[tuple[str, str], dict]:
    """Write the table, the picture and all numbers of a grid, from the run folders of every place; return its cells."""
    cells = {place: outcome(seeds) for place, seeds in runs.items()}
    folders = sorted({run for seeds in runs.values() for run in seeds})
    configs = [json.loads((run / "config.json").read_text()) for run in folders]
    made = {run.name: json.loads((run / "provenance.json").read_text()) for run in folders}
    steps = " or ".join(str(number) for number in sorted({cell["steps"][-1] for cell in cells.values()}))
    rates = " or ".join(f"{rate:g}" for rate in sorted({config["lr"] for config in configs}))
    pictures = "pictures held back from the training set" if configs[0]["hold_out"] else "the test pictures"
    lines = [
        *grid_table(name, cells),
        "",
        f"Accuracy (%) on {pictures} after the last step: mean ± standard deviation over the seeds (their number); one "
        "seed where a value stands alone.",
        f"All runs: `{configs[0]['model']}`, {steps} steps of {configs[0]['batch_size']}, learning rate {rates}.",
    ]
    record = {"cells": [{"row": row, "column": column} | cell for (row, column), cell in cells.items()], "runs": made}
    entries = [entry for history in made.values() for entry in history]
    save(f"{folder}/{name}", record, lines, entries, draw_grid(name, cells))
    return cells


def grid_table(name: str, cells: dict) -> list[str]:
    """A grid as a table, with what the paper has beside it."""
    (rows, columns), (paper_columns, paper) = axes_of(cells), PAPER.get(name, ([], []))
    table = [[row, *(spell(cells[row, column]) for column in columns)] for row in rows]
    for line, values in zip(table, paper, strict=False):
        line += [f"{value:.1f}" for value in values]
    return markdown([name.replace("-", " "), *columns, *(f"paper: {column}" for column in paper_columns)], table)


def spell(cell: dict) -> str:
    """The mean of a cell; where there are several seeds, also the spread and their number."""
    several = "" if cell["spread"] is None else f" ± {cell['spread']:.1f} ({len(cell['accuracy'])})"
    return f"{cell['mean']:.1f}{several}"


def write_gates(
    run: str, metrics: list[dict], grid: tuple[int, int], maps: dict[str, tuple[Tensor, Tensor]], device: torch.device
):
    """Write the gates and the non-locality of a run over training, and draw what its heads look at.

    `maps` has the gates (l h) and the maps (l h Y X) of the GPSA layers, by the name of a time.
    """
    uniform, first, last, table = uniform_non_locality(grid), metrics[0], metrics[-1], []
    for layer, gate in enumerate(last["heads"]["gate"]):
        has_gates = gate[0] is not None
        values = [mean(first["heads"]["gate"][layer]), mean(gate), min(gate)] if has_gates else []
        distances = [mean(line["heads"]["non_locality"][layer]) for line in (first, last)]
        cells = [f"{value:.2f}" for value in values] or [""] * 3
        table.append([str(layer + 1), *cells, *(f"{distance:.2f}" for distance in distances)])
    before, after = (f"epoch {line['epoch']}" for line in (first, last))
    head = ["layer", f"mean gate, {before}", after, f"lowest, {after}", f"non-locality, {before}", after]
    lines = [
        *markdown(head, table),
        "",
        f"Run `{run}`. A gate of 1 is all position, 0 all content. Non-locality is the mean attended distance in "
        f"patches; uniform attention has {uniform:.2f}.",
    ]
    heads = [{key: line["heads"][key] for key in ("gate", "non_locality")} for line in metrics]
    record = {"run": run, "uniform": uniform, "epochs": [line["epoch"] for line in metrics], "heads": heads}
    save("gates", record, lines, [provenance(device)], draw_heads(metrics, uniform, maps))


def write_masking(run: str, without_embedding: float, curves: dict[str, list[float]], device: torch.device):
    """Write how accurate a run's model is with its position embedding masked, and with parts of its GPSA layers.

    `curves` has that with the first 0, 1, 2 ... layers masked, for "content" and "position".
    """
    table = [
        [str(count), *(f"{value:.1f}" for value in row)] for count, row in enumerate(zip(*curves.values(), strict=True))
    ]
    lines = [
        *markdown(["first GPSA layers masked", *curves], table),
        "",
        f"Test accuracy (%) of run `{run}`, nothing trained again. With the position embedding masked it has "
        f"{without_embedding:.1f}.",
        "In the paper (ConViT-Ti, ImageNet) 73.1 becomes 67.1 without position embedding; without content in the first "
        "3, 5 and 10 layers 62.3, 35.0 and 1.3; without position 63.5, 53.1 and 46.8.",
    ]
    record = {"run": run, "position_embedding_masked": without_embedding, "masked_in_first_layers": curves}
    save("masking", record, lines, [provenance(device)], draw_masking(without_embedding, curves))


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table, line by line."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def save(name: str, record: dict, lines: list[str], made: list[dict], figure: Figure):
    """Write all three files of a result and print its table. `made` tells on what: entries of provenance.json."""
    file = RESULTS / name
    file.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    keys = ("device", "machine", "python", "torch", "torchvision")
    hardware = sorted({", ".join(f"{key}: {entry[key]}" for key in keys) for entry in made})
    text = "\n".join([*lines, f"`{command}`; {'; '.join(hardware)}."])
    record = {"command": command, "hardware": hardware} | record
    write(file.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write(file.with_suffix(".md"), f"{text}\n\n![the same as a picture]({file.name}.png)\n")
    figure.savefig(file.with_suffix(".png"), dpi=120)
    print(f"\n{text}\n\n{file}.md, .json, .png", flush=True)


def draw_grid(name: str, cells: dict) -> Figure:
    """The picture of a grid."""
    if name == "ablation":
        return draw_ablation(cells)
    if name == "locality":
        return draw_locality(cells)
    if name == "learning-rate":
        return draw_lines(cells, "learning rate", "accuracy on held-back pictures (%)")
    return draw_lines(cells, "share of the training pictures", "test accuracy (%)")


def draw_lines(cells: dict, xlabel: str, ylabel: str) -> Figure:
    """Accuracy over the rows, a line a column."""
    rows, columns = axes_of(cells)
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    panel = figure.subplots()
    for column, colour, marker in zip(columns, COLOURS, MARKERS, strict=False):
        panel.errorbar(rows, *of_column(cells, column), color=colour, marker=marker, capsize=4, label=column)
    panel.set(xlabel=xlabel, ylabel=ylabel)
    panel.legend(frameon=False)
    return figure


def draw_ablation(cells: dict) -> Figure:
    """Accuracy of every row, a panel a column; the dashed line is the first row's."""
    rows, columns = axes_of(cells)
    figure = Figure(figsize=(9, 1 + 0.32 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    for panel, column in zip(panels, columns, strict=True):
        means, spreads = of_column(cells, column)
        panel.errorbar(means, rows, xerr=spreads, color=COLOURS[0], marker="o", linestyle="", capsize=4)
        panel.axvline(means[0], color="grey", linestyle="--", linewidth=1)
        panel.set(title=f"{column} of the pictures", xlabel="test accuracy (%)")
    panels[0].invert_yaxis()
    return figure


def draw_locality(cells: dict) -> Figure:
    """Accuracy over steps, a panel a column, a line a row; the first row, without GPSA, is dashed."""
    rows, columns = axes_of(cells)
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    colours = ["grey", *colormaps["viridis"](np.linspace(0.8, 0.1, len(rows) - 1))]
    for panel, column in zip(panels, columns, strict=True):
        for row, colour, style in zip(rows, colours, ["--", *["-"] * len(rows)], strict=False):
            cell = cells[row, column]
            panel.plot(cell["steps"], cell["curve"], style, color=colour, marker=".", label=row)
        panel.set(title=column, xlabel="step")
    panels[0].set_ylabel("test accuracy (%)")
    panels[-1].legend(frameon=False)
    return figure


def draw_heads(metrics: list[dict], uniform: float, maps: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    """Gates and non-locality over training (Figs. 6 and 5), and below the map of every head at each time of `maps`."""
    layers, heads = next(iter(maps.values()))[0].shape
    figure = Figure(figsize=(11, 6.2 + 0.6 * layers), layout="constrained")
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=[2.6, 2.8, 0.8 + 0.6 * layers])
    draw_gates(metrics, top)
    draw_non_locality(metrics, uniform, middle)
    for panel, (time, (gate, of_heads)) in zip(bottom.subplots(1, len(maps)), maps.items(), strict=True):
        height, width = of_heads.shape[2:]
        tiles = np.full((layers, height + 1, heads, width + 1), np.nan)  # a gap below and right of every map
        peak = of_heads.amax(dim=(2, 3), keepdim=True)  # each map on its own scale, or flat ones would all be dark
        tiles[:, :height, :, :width] = (of_heads / peak).permute(0, 2, 1, 3).numpy()
        panel.imshow(tiles.reshape(layers * (height + 1), heads * (width + 1)), vmin=0)
        for layer, head in np.ndindex(layers, heads):
            corner = head * (width + 1) - 0.3, (layer + 1) * (height + 1) - 1.8
            panel.text(*corner, f"{gate[layer, head]:.2f}", color="white", fontsize=5)
        panel.set_yticks(np.arange(layers) * (height + 1) + (height - 1) / 2, [f"layer {n + 1}" for n in range(layers)])
        panel.set(title=f"from the middle patch, {time}", xticks=[], frame_on=False)
        panel.tick_params(length=0)
    return figure


def draw_masking(without_embedding: float, curves: dict[str, list[float]]) -> Figure:
    """Accuracy over the number of masked layers, a line a part."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    panel = figure.subplots()
    for (part, accuracy), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        panel.plot(range(len(accuracy)), accuracy, color=colour, marker=marker, label=f"{part} masked")
    panel.axhline(without_embedding, color="grey", linestyle="--", label="position embedding masked")
    panel.set(xlabel="in the first so many GPSA layers", ylabel="test accuracy (%)", ylim=(0, None))
    panel.locator_params(axis="x", integer=True)
    panel.legend(frameon=False)
    return figure


def of_column(cells: dict, column: str) -> tuple[list[float], list[float]]:
    """Means and spreads of a column; NaN, which draws no bar, for one seed."""
    chosen = [cell for (_, name), cell in cells.items() if name == column]
    return [cell["mean"] for cell in chosen], [cell["spread"] or np.nan for cell in chosen]


def axes_of(cells: dict) -> tuple[list[str], list[str]]:
    """The names of rows and columns, in their order."""
    return list(dict.fromkeys(row for row, _ in cells)), list(dict.fromkeys(column for _, column in cells))
