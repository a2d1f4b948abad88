"""Tables and figures: of the grid, of any runs side by side, and of a single result."""

import json
import math
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import grid
from experiments.sweep import read_run, read_runs
from train_cifar import Config
from training.checkpoint import provenance, write_text
from training.distributed import UserError

COLORS = {"convit": "#0072B2", "vit": "#D55E00"}  # Okabe and Ito's: safe for color-blind readers
MARGIN = 1.5  # smaller differences, in points of accuracy, count as equivalent
LABELS = {
    "convit": "ConViT",
    "vit": "plain ViT",
    "gates-0.5": "ConViT, gates frozen at 0.5",
    "gates-0.73": "ConViT, gates frozen at 0.73",
    "convit-pool-mean": "ConViT, mean pooling",
    "vit-pool-mean": "plain ViT, mean pooling",
}
GRID_NOTES = f"""\
Test accuracy after the last of 10,000 steps. A contrast is the mean difference between runs of the same seed, with a
95% confidence interval and a paired t-test; Holm's method adjusts p (but not the interval) for all planned contrasts.
A contrast counts as equivalent to 0 within {MARGIN} points if two one-sided tests, each at the 5% level and unadjusted,
rule out larger differences. Intervals cover what the seed determines (weights, subset, order, augmentation), not the
choice of test images or of learning rates (one run each). A verdict is preliminary while pairs are missing."""
TUNING_NOTES = "One run each, with seed 100: 5,000 steps, evaluated on a 10% validation split."
PATTERN_NOTES = """\
3,120 steps of 32 images, in fp32 (TF32 on a GPU), at a learning rate of 0.001, not tuned, unless the arm has another;
accuracy is measured every 156 steps. learned: the default; vit: the plain ViT; gates-X: gates frozen at X; gate-lr-1:
gates at the learning rate of the other weights. No tests."""
Settings = dict[tuple[str, str], dict[int, list[dict]]]  # metrics by (model, data fraction) and seed


def half_interval(values: list[float]) -> float:
    """Half the width of the 95% confidence interval of a mean; NaN for a single value."""
    from scipy.stats import ttest_1samp  # in requirements-dev.txt; only the report of the grid needs it

    return ttest_1samp(values, 0).confidence_interval().high - np.mean(values) if len(values) > 1 else math.nan


def verdict(p: float, p_equivalence: float) -> str:
    """What the tests of a difference and of equivalence say."""
    is_close = p_equivalence < 0.05
    if p < 0.05:
        return f"different, by less than {MARGIN} points" if is_close else "different"
    return f"equivalent within {MARGIN} points" if is_close else "undecided"


def holm(p_values: list[float]) -> np.ndarray:
    """Adjust p-values for multiple tests (Holm, 1979)."""
    order, count = np.argsort(p_values), len(p_values)
    adjusted = np.empty(count)
    adjusted[order] = np.maximum.accumulate(np.sort(p_values) * np.arange(count, 0, -1)).clip(max=1)
    return adjusted


def accuracies(runs: dict[int, list[dict]]) -> dict[int, float]:
    """Accuracy of every seed after the last step, in percent."""
    return {seed: metrics[-1]["test_accuracy"] for seed, metrics in runs.items()}


def contrast_table(settings: Settings) -> str:
    """The planned contrasts, with numbers and a verdict if there are at least two pairs of seeds."""
    from scipy.stats import ttest_1samp

    pairs, rows = [], []
    for signs in grid.CONTRASTS.values():
        terms = [(sign, accuracies(settings.get(setting, {}))) for setting, sign in signs.items()]
        seeds = set(grid.SEEDS).intersection(*(by_seed for _, by_seed in terms))
        pairs.append([sum(sign * by_seed[seed] for sign, by_seed in terms) for seed in seeds])
    p_values = [ttest_1samp(values, 0).pvalue if len(values) > 1 else 1 for values in pairs]  # 1: not tested yet
    for name, values, p, p_holm in zip(grid.CONTRASTS, pairs, p_values, holm(p_values), strict=True):
        row = [name, f"{len(values)} of {len(grid.SEEDS)}"]
        if len(values) > 1:
            mean, half = np.mean(values), half_interval(values)
            sides = (-MARGIN, "greater"), (MARGIN, "less")
            p_equivalence = max(ttest_1samp(values, bound, alternative=side).pvalue for bound, side in sides)
            row += [f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})", f"{p:.3g}", f"{p_holm:.3g}"]
            row += [f"{p_equivalence:.3g}", verdict(p_holm, p_equivalence)]
        rows.append(row)
    header = ["contrast", "pairs of seeds", "points (95% interval)", "p", "p, Holm", "p, equivalence", "verdict"]
    return markdown(header, rows)


def accuracy_table(settings: Settings) -> str:
    """Mean, interval, and every seed's accuracy of the settings on CIFAR-10."""
    rows = []
    for (model, fraction), runs in settings.items():
        values = list(accuracies(runs).values())
        interval = f" ± {half_interval(values):.1f}" if len(values) > 1 else ""
        seeds = ", ".join(f"{value:.1f}" for value in values)
        rows.append([LABELS[model], fraction, f"{np.mean(values):.1f}{interval}", str(len(values)), seeds])
    return markdown(["model", "training images", "test accuracy (%), 95% interval", "seeds", "each seed"], rows)


def tuning_table(records: dict[str, dict]) -> str:
    """Validation accuracy by learning rate, for every model and data fraction."""
    rows = []
    for fraction, model in product(grid.FRACTIONS, grid.MODELS):
        best, learning_rates = grid.tune_learning_rate(model, fraction, records)
        for lr in learning_rates:
            if record := records.get(grid.tuning_name(model, fraction, lr)):
                cells = [f"{fraction:.0%}", f"{lr:g}", f"{record['metrics'][-1]['test_accuracy']:.1f}"]
                rows.append([LABELS[model], *cells, "yes" if lr == best else ""])
    return markdown(["model", "training images", "learning rate", "validation accuracy (%)", "chosen"], rows)


def patterns_table(arms: dict[str, dict[int, list[dict]]]) -> str:
    """Steps until the accuracy on the synthetic patterns exceeds 99%, final accuracy, and training loss."""
    rows = []
    for arm, runs in arms.items():
        reached = [[row["step"] for row in metrics if row["test_accuracy"] > 99] for metrics in runs.values()]
        columns = (
            [str(steps[0]) if steps else "never" for steps in reached],
            [f"{value:.1f}" for value in accuracies(runs).values()],
            [f"{metrics[-1]['train_loss']:.3f}" for metrics in runs.values()],
        )
        rows.append([arm, *map(", ".join, columns)])
    return markdown(["arm", "steps to 99%, each seed", "final accuracy (%)", "training loss"], rows)


def plot_seeds(axes: Axes, values: dict[str, list[float]]):
    """The accuracy of every run as a dot, one row per setting, the first on top."""
    for row, row_values in enumerate(values.values()):
        axes.plot(row_values, [row] * len(row_values), "o", color=COLORS["convit"], alpha=0.5)
    axes.set_yticks(range(len(values)), values)
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy (%)")


def fraction_panels(settings: Settings) -> tuple[Figure, dict[str, Axes]]:
    """A figure with one panel for every data fraction that has runs."""
    fractions = dict.fromkeys(fraction for _, fraction in settings)
    figure = Figure(figsize=(4 * len(fractions), 3.2), layout="constrained")
    panels = dict(zip(fractions, figure.subplots(1, len(fractions), squeeze=False)[0], strict=True))
    for fraction, axes in panels.items():
        axes.set_title(f"{fraction} of the training images")
    return figure, panels


def plot_accuracy(settings: Settings) -> Figure:
    """Accuracy of every seed, its mean and 95% interval, by setting."""
    figure, panels = fraction_panels(settings)
    for fraction, axes in panels.items():
        runs = {LABELS[model]: runs for (model, other), runs in settings.items() if other == fraction}
        values = {label: list(accuracies(by_seed).values()) for label, by_seed in runs.items()}
        plot_seeds(axes, values)
        for row, row_values in enumerate(values.values()):
            axes.errorbar(np.mean(row_values), row, xerr=half_interval(row_values), fmt="|k", capsize=4)
    return figure


def plot_curves(settings: Settings) -> Figure:
    """Test accuracy over steps, without step 0: every seed, the mean, and its 95% interval."""
    figure, panels = fraction_panels(settings)
    for (model, fraction), runs in settings.items():
        axes, steps = panels[fraction], [row["step"] for row in next(iter(runs.values()))[1:]]
        curves = np.array([[row["test_accuracy"] for row in metrics[1:]] for metrics in runs.values()])
        axes.plot(steps, curves.T, color=COLORS[model], alpha=0.3)
        mean, half = curves.mean(0), np.apply_along_axis(half_interval, 0, curves)
        axes.plot(steps, mean, color=COLORS[model], linewidth=2, label=LABELS[model])
        axes.fill_between(steps, mean - half, mean + half, color=COLORS[model], alpha=0.15, linewidth=0)
        axes.set(xlabel="step", ylabel="test accuracy (%)")
        axes.legend(frameon=False)
    return figure


def plot_heads(settings: Settings) -> Figure:
    """Gate, locality strength, and attention distance per layer after the last step: every seed, and the mean."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    labels = {"gate": "gate", "strength": "locality strength", "non_locality": "attention distance (patches)"}
    for axes, (key, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        for (model, fraction), runs in settings.items():
            heads = np.array([metrics[-1]["heads"][key] for metrics in runs.values()], dtype=float)
            if np.isfinite(heads).any():  # a plain ViT has only attention distances
                layers, means = range(1, heads.shape[1] + 1), heads.mean(2)
                color, style = COLORS[model], "o--" if fraction == "10%" else "s-"
                axes.plot(layers, means.T, style[0], color=color, markersize=3, alpha=0.4)
                axes.plot(layers, means.mean(0), style, color=color, label=f"{LABELS[model]}, {fraction}")
        axes.set(xlabel="layer", ylabel=f"mean {label}")
    axes.legend(frameon=False, fontsize="small")
    return figure


def write_grid(out: Path):
    """Write README.md and figures for the runs in `out`/runs.jsonl, whichever of the grid are finished."""
    if not find_spec("scipy"):
        raise UserError("the report needs a package: pip install scipy")
    records = read_runs(out / "runs.jsonl")
    names = list(grid.make_plan(records))
    finished = {name: records[name] for name in names if name in records}
    if not finished:
        raise UserError(f"{out} has no runs.jsonl with finished runs of the grid")
    settings, arms = {}, {}
    for name, record in finished.items():
        setting, _, seed = name.rpartition("-seed")  # no setting: a tuning run
        if setting.startswith("patterns-"):
            arms.setdefault(setting.removeprefix("patterns-"), {})[int(seed)] = record["metrics"]
        elif setting:
            settings.setdefault(tuple(setting.rsplit("-", 1)), {})[int(seed)] = record["metrics"]
    summary, commits = provenance_summary(list(finished.values())), {}  # by device
    for record in finished.values():
        entry = record["provenance"][0]
        commit, dash, dirty = str(entry["commit"]).partition("-")
        commits.setdefault(entry["device"], []).append(commit[:7] + dash + dirty)
    trained = [f"{len(runs)} on {device} at {', '.join(sorted(set(runs)))}" for device, runs in commits.items()]
    parts = [
        "# ConViT and a plain ViT on 10% and on all of CIFAR-10",
        f"{len(finished)} of the {len(names)} planned runs: [runs.jsonl](runs.jsonl), trained {'; '.join(trained)}. "
        f'docs/results.md, "Sample efficiency and gating", describes them. `{summary["command"]}` writes this page.',
        f"Machines: {'; '.join(summary['hardware'])}.",
        GRID_NOTES,
        *([accuracy_table(settings)] if settings else []),
        contrast_table(settings),
    ]
    both_models = {setting: runs for setting, runs in settings.items() if setting[0] in COLORS}
    for name, plot, shown, caption in (
        ("accuracy", plot_accuracy, settings, "Accuracy of every seed, mean and 95% interval"),
        ("curves", plot_curves, both_models, "Test accuracy over steps: every seed, mean, and 95% interval"),
        ("heads", plot_heads, both_models, "Gate, locality strength, and attention distance by layer, seeds and mean"),
    ):
        if shown:
            plot(shown).savefig(out / f"{name}.png", dpi=120)
            parts.append(f"![{caption}]({name}.png)")
    parts += ["## Learning rates", TUNING_NOTES, tuning_table(records)]
    if arms:
        parts += ["## Synthetic patterns", PATTERN_NOTES, patterns_table(arms)]
    write_text(out / "README.md", "\n\n".join(parts) + "\n")


def compare(folder: Path, runs: list[Path]):
    """Write `folder`/README.md and compare.png: accuracy and mean gate of its runs.jsonl and of run folders."""
    finished = list(read_runs(folder / "runs.jsonl").values())
    if not finished:
        raise UserError(f"{folder} has no runs.jsonl with finished runs")
    for run in runs:
        if not (run / "metrics.jsonl").exists():
            raise UserError(f"{run} is not a run folder of train_cifar.py")
    records = [*map(read_run, runs), *finished]
    configs = [run["config"] for run in records]
    on_val = {bool(config.get("val_fraction")) or config.get("dataset") == "imagenet" for config in configs}
    if len(on_val) > 1:
        raise UserError("only some of the runs were evaluated on validation images: compare them separately")
    images = "validation" if True in on_val else "test"
    figure, rows = Figure(figsize=(9, 3.2), layout="constrained"), []
    panels = figure.subplots(1, 2)
    for run in records:
        epochs, accuracy = ([row[key] for row in run["metrics"]] for key in ("epoch", "test_accuracy"))
        gates = [gate.mean() if len(gate) else math.nan for gate, _ in map(gpsa_heads, run["metrics"])]
        for axes, values in zip(panels, (accuracy, gates), strict=True):
            axes.plot(epochs, values, "o-", markersize=4, label=f"{run['name']}: {run['config']['model']}")
            axes.locator_params(axis="x", integer=True)
        gate = "" if math.isnan(gates[-1]) else f"{gates[-1]:.2f}"
        rows.append([run["name"], f"{accuracy[-1]:.1f}", str(epochs[-1]), gate, f"`{run['provenance'][0]['command']}`"])
    panels[0].set(xlabel="epoch", ylabel=f"{images} accuracy (%)")
    panels[1].set(xlabel="epoch", ylabel="mean gate (0: content, 1: position)", ylim=(0, 1.03))
    panels[0].legend(frameon=False, fontsize="small")
    figure.savefig(folder / "compare.png", dpi=120)

    table = markdown(["run", f"{images} accuracy after the last epoch (%)", "epochs", "mean gate", "command"], rows)
    summary = provenance_summary(records)
    notes = f"One run per row. {'; '.join(summary['hardware'])}. Table and plot: `{summary['command']}`."
    write_text(folder / "README.md", f"{table}\n\n{notes}\n\n![accuracy and mean gate over epochs](compare.png)\n")


def gpsa_heads(row: dict) -> np.ndarray:
    """Gate and non-locality of every GPSA head in a row of metrics (2 n); n is 0 for a plain ViT."""
    heads = np.array([row["heads"]["gate"], row["heads"]["non_locality"]], dtype=float).reshape(2, -1)
    return heads[:, np.isfinite(heads[0])]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def provenance_summary(runs: Sequence[dict]) -> dict:
    """The running command, and the distinct machines and versions of some runs or, without runs, of this process."""
    keys = ("device", "cpu", "machine", "python", "torch", "torchvision")
    current = provenance(torch.device(Config.device))
    entries = [entry for run in runs for entry in run["provenance"]] or [current]
    hardware = sorted({", ".join(f"{key}: {entry[key]}" for key in keys if entry.get(key)) for entry in entries})
    return {"command": current["command"], "hardware": hardware}


def save(file: Path, record: dict, table: str, notes: str, figure: Figure, runs: Sequence[dict] = ()):
    """Write FILE.md, FILE.json, and FILE.png for a result, with the provenance of its runs; print the text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    record = provenance_summary(runs) | record
    text = f"{table}\n\n{notes}\n`{record['command']}`; {'; '.join(record['hardware'])}."
    write_text(file.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_text(file.with_suffix(".md"), f"{text}\n\n![{file.name.capitalize()}, plotted]({file.name}.png)\n")
    figure.savefig(file.with_suffix(".png"), dpi=120)
    print(f"\n{text}\n\n{file}.md, .json, .png", flush=True)
