"""Draw several runs into one picture and one table: `python -m results.compare results/patterns`.

Writes compare.png and README.md into that folder, from config.json, metrics.jsonl and provenance.json of each run.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from analysis import read_metrics


def mean_gate(line: dict) -> float:
    """Mean of sigmoid(gate) over all heads of the GPSA layers; NaN for a plain ViT."""
    gates = [gate for layer in line["heads"]["gate"] for gate in layer if gate is not None]
    return float(np.mean(gates)) if gates else np.nan


def draw(runs: dict[str, list[dict]], pictures: str) -> Figure:
    """Accuracy and mean gate of every run over epochs."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    accuracy, gates = figure.subplots(1, 2)
    for name, metrics in runs.items():
        epochs = [line["epoch"] for line in metrics]
        accuracy.plot(epochs, [line["test_accuracy"] for line in metrics], "o-", markersize=4, label=name)
        gates.plot(epochs, [mean_gate(line) for line in metrics], "o-", markersize=4)
    accuracy.set(xlabel="epoch", ylabel=f"accuracy on {pictures} pictures (%)")
    gates.set(xlabel="epoch", ylabel="mean gate: 0 content, 1 position", ylim=(0, 1.03))
    accuracy.legend(frameon=False, fontsize="small")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds one folder a run")
    parser.add_argument("others", type=Path, nargs="*", help="folders of other runs to put beside them")
    given = parser.parse_args()
    folders = [*given.others, *sorted(file.parent for file in given.folder.glob("*/metrics.jsonl"))]
    runs = {folder.name: read_metrics(folder) for folder in folders}
    held_out = json.loads((folders[0] / "config.json").read_text()).get("hold_out")
    pictures = "held-back" if held_out else "test"
    lines = [
        f"| run | accuracy at the end, {pictures} pictures (%) | epochs | mean gate at the end | command |",
        "|---|---|---|---|---|",
    ]
    for folder in folders:
        last = runs[folder.name][-1]
        provenance = json.loads((folder / "provenance.json").read_text())[0]
        gate = "" if np.isnan(mean_gate(last)) else f"{mean_gate(last):.2f}"
        command = provenance.pop("command")
        lines.append(f"| {folder.name} | {last['test_accuracy']:.1f} | {last['epoch']} | {gate} | `{command}` |")
    where = ", ".join(f"{key}: {value}" for key, value in provenance.items() if value)
    lines += ["", f"{where}; one seed each.", "", "![accuracy and gates](compare.png)"]
    (given.folder / "README.md").write_text("\n".join(lines) + "\n")
    draw(runs, pictures).savefig(given.folder / "compare.png", dpi=120)


if __name__ == "__main__":
    main()
