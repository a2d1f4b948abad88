"""Draw the runs of a folder into one picture and one table: `python -m results.compare results/patterns`.

Writes compare.png and README.md there, from each run's config.json, metrics.jsonl and provenance.json.
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


def draw(runs: dict[str, list[dict]]) -> Figure:
    """Accuracy and mean gate of every run over epochs."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    accuracy, gates = figure.subplots(1, 2)
    for name, metrics in runs.items():
        epochs = [line["epoch"] for line in metrics]
        accuracy.plot(epochs, [line["test_accuracy"] for line in metrics], "o-", label=name)
        gates.plot(epochs, [mean_gate(line) for line in metrics], "o-")
    accuracy.set(xlabel="epoch", ylabel="test accuracy (%)")
    gates.set(xlabel="epoch", ylabel="mean gate: 0 content, 1 position", ylim=(0, 1.03))
    accuracy.legend(frameon=False)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds one folder a run")
    folder = parser.parse_args().folder
    runs = {file.parent.name: read_metrics(file.parent) for file in sorted(folder.glob("*/metrics.jsonl"))}
    lines = ["| run | test accuracy, by epoch (%) | mean gate at the end | command |", "|---|---|---|---|"]
    for name, metrics in runs.items():
        provenance = json.loads((folder / name / "provenance.json").read_text())[0]
        scores = ", ".join(f"{line['test_accuracy']:.1f}" for line in metrics)
        gate = "" if np.isnan(mean_gate(metrics[-1])) else f"{mean_gate(metrics[-1]):.2f}"
        lines.append(f"| {name} | {scores} | {gate} | `{provenance.pop('command')}` |")
    lines += ["", ", ".join(f"{key}: {value}" for key, value in provenance.items()) + "; one seed each."]
    (folder / "README.md").write_text("\n".join(lines) + "\n\n![accuracy and gates](compare.png)\n")
    draw(runs).savefig(folder / "compare.png", dpi=120)


if __name__ == "__main__":
    main()
