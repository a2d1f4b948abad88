"""Compare settings whose runs are paired by seed: the same images, in the same order, with the same augmentation.

    python -m experiments.paired          tables, tests, and figures of results/evidence/runs.jsonl

Only the accuracy after the last step enters a test. Differences have a 95% confidence interval and a paired t-test,
adjusted by Holm's method for all contrasts of the table. Two settings are called equivalent only if two one-sided tests
reject a difference of MARGIN points or more; otherwise they are not told apart.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from experiments.report import COLORS, markdown, provenance_summary
from experiments.sweep import Sweep
from training.checkpoint import write_text

FOLDER = Path(__file__).parent.parent / "results" / "evidence"
MARGIN = 1.5  # points of accuracy
LABELS = {
    "convit": "ConViT",
    "vit": "plain ViT",
    "gates-0.5": "gates frozen at 0.5",
    "gates-0.73": "gates frozen at 0.73",
}
Runs = dict[int, dict]  # by seed


class Contrast(NamedTuple):
    """A mean difference between paired runs, in points of accuracy."""

    mean: float
    low: float  # of the 95% confidence interval
    high: float
    p: float  # of the two-sided t-test
    p_equivalence: float  # of two one-sided tests: the difference is smaller than MARGIN
    pairs: int

    def verdict(self, p_adjusted: float) -> str:
        if p_adjusted < 0.05:
            return "different"
        return f"equivalent within {MARGIN} points" if self.p_equivalence < 0.05 else "not told apart"


def contrast(differences: list[float]) -> Contrast:
    """Test at least two differences, one per seed, against 0."""
    test = stats.ttest_1samp(differences, 0)
    one_sided = [
        stats.ttest_1samp(differences, bound, alternative=side).pvalue
        for bound, side in ((-MARGIN, "greater"), (MARGIN, "less"))
    ]
    return Contrast(
        float(np.mean(differences)), *test.confidence_interval(), test.pvalue, max(one_sided), len(differences)
    )


def holm(p_values: list[float]) -> list[float]:
    """Adjust p-values for multiple tests (Holm, 1979)."""
    order, count = np.argsort(p_values), len(p_values)
    adjusted = np.empty(count)
    adjusted[order] = np.maximum.accumulate(np.sort(p_values) * np.arange(count, 0, -1)).clip(max=1)
    return adjusted.tolist()


def accuracy(record: dict) -> float:
    """Test accuracy after the last step, in percent."""
    return record["metrics"][-1]["test_accuracy"]


def by_setting(records: dict[str, dict]) -> dict[str, Runs]:
    """Runs named SETTING-seedN, by setting and seed."""
    settings: dict[str, Runs] = {}
    for name, record in records.items():
        if match := re.fullmatch(r"(.+)-seed(\d+)", name):
            settings.setdefault(match[1], {})[int(match[2])] = record
    return settings


def differences(first: Runs, second: Runs) -> dict[int, float]:
    """Accuracy of `first` minus `second`, for the seeds that both have."""
    return {seed: accuracy(first[seed]) - accuracy(second[seed]) for seed in sorted(first.keys() & second.keys())}


def contrasts(settings: dict[str, Runs]) -> dict[str, Contrast]:
    """The planned contrasts of the runs on CIFAR-10 that have at least two pairs."""

    def lead(fraction: str, other: str) -> dict[int, float]:
        return differences(settings.get(f"convit-{fraction}", {}), settings.get(f"{other}-{fraction}", {}))

    scarce, plenty = lead("10%", "vit"), lead("100%", "vit")
    pairs = {
        "ConViT - plain ViT, 10%": scarce,
        "lead on 10% - lead on 100%": {seed: scarce[seed] - plenty[seed] for seed in scarce.keys() & plenty.keys()},
        "ConViT - gates frozen at 0.5, 10%": lead("10%", "gates-0.5"),
        "ConViT - gates frozen at 0.73, 10%": lead("10%", "gates-0.73"),
    }
    return {name: contrast(list(values.values())) for name, values in pairs.items() if len(values) > 1}


def mean_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% confidence interval (NaN for one value)."""
    if len(values) < 2:
        return float(np.mean(values)), np.nan
    return float(np.mean(values)), stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)


def accuracy_table(settings: dict[str, Runs]) -> list[str]:
    """Mean, interval, and every seed's accuracy of the settings on CIFAR-10."""
    rows = []
    for model, label in LABELS.items():
        for fraction in ("10%", "100%"):
            if runs := settings.get(f"{model}-{fraction}"):
                values = [accuracy(runs[seed]) for seed in sorted(runs)]
                mean, half = mean_interval(values)
                seeds = ", ".join(f"{value:.1f}" for value in values)
                rows.append([label, fraction, f"{mean:.1f} ± {half:.1f}", str(len(values)), seeds])
    return markdown(["model", "training images", "test accuracy (%), 95% interval", "seeds", "each seed"], rows)


def contrast_table(found: dict[str, Contrast]) -> list[str]:
    """Difference, interval, p-values, and verdict of every contrast."""
    adjusted = holm([result.p for result in found.values()])
    rows = [
        [name, f"{result.mean:+.1f} ({result.low:+.1f} to {result.high:+.1f})", str(result.pairs),
         f"{result.p:.3g}", f"{p:.3g}", f"{result.p_equivalence:.3g}", result.verdict(p)]
        for (name, result), p in zip(found.items(), adjusted, strict=True)
    ]  # fmt: skip
    header = ["contrast", "points (95% interval)", "pairs", "p", "p, Holm", "p, equivalence", "verdict"]
    return markdown(header, rows)


def patterns_table(settings: dict[str, Runs], threshold: float = 99.0) -> list[str]:
    """Steps until the accuracy on the synthetic patterns exceeds a threshold, final accuracy, and training loss."""
    rows = []
    for setting, runs in settings.items():
        if setting.startswith("patterns-"):
            histories = [runs[seed]["metrics"] for seed in sorted(runs)]
            reached = [
                next((str(row["step"]) for row in history if row["test_accuracy"] > threshold), "never")
                for history in histories
            ]
            finals = [f"{history[-1]['test_accuracy']:.1f}" for history in histories]
            losses = [f"{history[-1]['train_loss']:.3f}" for history in histories]
            rows.append([setting.removeprefix("patterns-"), *map(", ".join, (reached, finals, losses))])
    return markdown(["arm", f"steps to {threshold:.0f}%, each seed", "final accuracy (%)", "training loss"], rows)


def plot_accuracy(settings: dict[str, Runs]) -> Figure:
    """Every seed as a dot, and mean and 95% interval, by setting."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    for axes, fraction in zip(figure.subplots(1, 2, sharey=True), ("10%", "100%"), strict=True):
        shown = {label: settings[f"{model}-{fraction}"] for model, label in LABELS.items()
                 if f"{model}-{fraction}" in settings}  # fmt: skip
        for row, runs in enumerate(shown.values()):
            values = [accuracy(record) for record in runs.values()]
            mean, half = mean_interval(values)
            axes.plot(values, [row] * len(values), "o", color=COLORS[0], alpha=0.4)
            axes.errorbar(mean, row, xerr=half, fmt="|", color="black", capsize=4)
        axes.set_yticks(range(len(shown)), shown)
        axes.set(title=f"{fraction} of the training images", xlabel="test accuracy (%)")
        axes.invert_yaxis()
    return figure


def plot_curves(settings: dict[str, Runs]) -> Figure:
    """Test accuracy over steps: mean over seeds, and its 95% interval as a band."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    for axes, fraction in zip(figure.subplots(1, 2), ("10%", "100%"), strict=True):
        for color, model in zip(COLORS, ("convit", "vit"), strict=False):
            if runs := settings.get(f"{model}-{fraction}"):
                histories = [record["metrics"] for record in runs.values()]
                steps = [row["step"] for row in histories[0]]
                points = [
                    mean_interval([row["test_accuracy"] for row in rows]) for rows in zip(*histories, strict=True)
                ]
                mean, half = np.array(points).T
                axes.plot(steps, mean, color=color, label=LABELS[model])
                axes.fill_between(steps, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
        axes.set(title=f"{fraction} of the training images", xlabel="step", ylabel="test accuracy (%)")
        axes.legend(frameon=False)
    return figure


def plot_heads(settings: dict[str, Runs]) -> Figure:
    """Gate, locality strength, and non-locality per layer after the last step: every seed's mean over heads."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    keys = {
        "gate": "mean gate",
        "strength": "mean locality strength",
        "non_locality": "mean attention distance (patches)",
    }
    for axes, (key, label) in zip(figure.subplots(1, 3), keys.items(), strict=True):
        for color, model in zip(COLORS, ("convit", "vit"), strict=False):
            for fraction, style in (("10%", "o--"), ("100%", "s-")):
                runs = settings.get(f"{model}-{fraction}", {})
                values = [
                    np.array(record["metrics"][-1]["heads"][key], dtype=float).mean(1) for record in runs.values()
                ]
                if values and not np.isnan(values).all():
                    layers = np.arange(1, len(values[0]) + 1)
                    axes.plot(layers, np.mean(values, axis=0), style, color=color, label=f"{LABELS[model]}, {fraction}")
                    axes.plot(layers, np.transpose(values), ".", color=color, alpha=0.4)
        axes.set(xlabel="layer", ylabel=label)
    axes.legend(frameon=False, fontsize="small")
    return figure


def write_report(records: dict[str, dict], folder: Path):
    """Write README.md and its figures."""
    settings = by_setting(records)
    names = {"accuracy": plot_accuracy, "curves": plot_curves, "heads": plot_heads}
    for name, plot in names.items():
        plot(settings).savefig(folder / f"{name}.png", dpi=120)
    summary = provenance_summary(list(records.values()))
    lines = [
        *accuracy_table(settings), "", *contrast_table(contrasts(settings)), "", *patterns_table(settings), "",
        f"`{summary['command']}`, from [runs.jsonl](runs.jsonl); runs: {'; '.join(summary['hardware'])}.", "",
        *(f"![{name}]({name}.png)" for name in names),
    ]  # fmt: skip
    write_text(folder / "README.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    write_report(Sweep(FOLDER / "runs.jsonl", FOLDER).records(), FOLDER)
