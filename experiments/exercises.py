"""Train the exercises of docs/exercises.md, each a change to the model, and write a table of the results.

    python -m experiments.exercises                 all, two seeds each: 22 runs; four minutes each on a core with AMX
    python -m experiments.exercises 3 8 --seeds 1   some of them

The ```diff blocks of a section are applied to a copy of the code, in which the section's command runs. To add your own
exercise, add a section. Rerun the same command to resume; an exercise that you have changed is trained again. Runs,
table, and plot go to --out (runs/exercises/). The times exclude evaluation.
"""

import argparse
import hashlib
import re
import shlex
import shutil
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure

from experiments.report import gpsa_heads, markdown, plot_seeds, save
from experiments.sweep import CODE, read_runs, run_main, train_sweep
from train_cifar import Config
from training.config import number
from training.distributed import UserError

TEXT = CODE / "docs" / "exercises.md"


@dataclass(frozen=True)
class Exercise:
    """A section of docs/exercises.md."""

    number: int  # 0 is the unchanged model
    title: str  # with the number
    diff: str  # all diffs of the section
    flags: list[str]  # of train_cifar.py, including the shared recipe

    @property
    def key(self) -> str:
        """The number, and a digest of the flags and the changed lines: the runs of a changed exercise are new ones."""
        changed_lines = [line for line in self.diff.splitlines() if line.startswith(("+", "-"))]
        return f"{self.number}-{hashlib.sha256(repr((self.flags, changed_lines)).encode()).hexdigest()[:6]}"


def parse_exercises(text: str) -> list[Exercise]:
    """The exercises of a text, in order. Raises UserError if one has no command."""
    recipe = re.search(r'RECIPE="(.*)"', text)
    _, *parts = re.split(r"^## (\d+)\. (.+)\n", text, flags=re.MULTILINE)
    exercises = []
    for index, title, section in zip(parts[0::3], parts[1::3], parts[2::3], strict=True):
        command = re.search(r"python train_cifar\.py \$RECIPE(.*)", section)
        if not recipe or not command:
            raise UserError(f"exercise {index} needs a command, python train_cifar.py $RECIPE ..., and a RECIPE=")
        flags = shlex.split(recipe[1] + re.sub(r"--run \S+", "", command[1]))
        diff = "@@\n".join(re.findall(r"^```diff\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL))
        exercises.append(Exercise(int(index), f"{index}. {title}", diff, flags))
    return exercises


def apply_diff(source: str, diff: str) -> str:
    """Apply every hunk of a diff, found by its text. Raises UserError unless the text occurs exactly once."""
    for hunk in filter(None, re.split(r"^@@.*\n", diff, flags=re.MULTILINE)):
        before = re.sub(r"^\+.*\n|^[ -]", "", hunk, flags=re.MULTILINE)  # without added lines, and without signs
        after = re.sub(r"^-.*\n|^[ +]", "", hunk, flags=re.MULTILINE)
        if source.count(before) != 1:
            raise UserError(f"convit_min.py has these lines {source.count(before)} times, not once:\n{before}")
        source = source.replace(before, after)
    return source


def train_exercises(numbers: list[int], seeds: int, data_dir: str, out: Path):
    """Train the missing runs of some exercises (none given: of all), and write the table of all finished runs."""
    exercises = {exercise.number: exercise for exercise in parse_exercises(TEXT.read_text())}
    if not exercises.keys() >= set(numbers):
        raise UserError(f"{TEXT.name} has the exercises {', '.join(map(str, exercises))}")
    selected = {exercises[number].key: exercises[number] for number in numbers or exercises}
    plan = {
        f"{key}-seed{seed}": [*exercise.flags, "--seed", str(seed), "--data-dir", data_dir]
        for seed, (key, exercise) in product(range(seeds), selected.items())
    }

    def prepare(name: str) -> Path:
        """Copy the training code and apply the diff of an exercise to the model."""
        exercise, folder = selected[name.rpartition("-seed")[0]], out / f"{name}.code"
        print(exercise.title, flush=True)
        model = apply_diff((CODE / "convit_min.py").read_text(), exercise.diff)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(CODE / "training", folder / "training")
        for file in CODE.glob("*.py"):
            shutil.copy(file, folder)
        (folder / "convit_min.py").write_text(model)
        return folder

    train_sweep(out, lambda finished: plan, prepare)
    write_results(exercises, out)


def write_results(exercises: dict[int, Exercise], out: Path):
    """Write a table and a plot of the finished runs in `out`/runs.jsonl, all seeds of an exercise in one row."""
    finished, shown, results, rows, baseline = read_runs(out / "runs.jsonl"), [], {}, [], {}
    for exercise in exercises.values():
        runs = [finished[name] for name in sorted(finished) if name.startswith(f"{exercise.key}-seed")]
        if not runs:
            continue
        shown += runs
        last = [run["metrics"][-1] for run in runs]
        by_seed = {run["config"]["seed"]: run["metrics"][-1]["test_accuracy"] for run in runs}
        accuracy = list(by_seed.values())
        differences = [f"{by_seed[seed] - baseline[seed]:+.1f}" for seed in by_seed if seed in baseline]
        if exercise.number == 0:
            baseline = by_seed
        gate, distance = np.concatenate([gpsa_heads(row) for row in last], axis=1)
        content_heads = (gate < 0.5).sum() / len(runs)
        heads = {"mean_gate": gate.mean(), "non_locality": distance.mean(), "content_heads": content_heads}
        results[exercise.title] = {"runs": [run["name"] for run in runs], "accuracy": accuracy} | heads
        std = f" ± {stdev(accuracy):.1f} ({len(runs)})" if len(runs) > 1 else ""
        cells = [f"{mean(accuracy):.1f}{std}", ", ".join(differences), f"{gate.mean():.2f}", f"{distance.mean():.2f}"]
        rows.append([exercise.title, *cells, f"{content_heads:.1f}"])
    config, steps = shown[0]["config"], shown[0]["metrics"][-1]["step"]
    notes = f"""\
Accuracy (%) on the test images after the last step: mean ± std over seeds (n); one seed where there is no ±.
First row: `{config["model"]}`, {steps:,} steps of {config["batch_size"]} images, learning rate {config["lr"]:g}.
Minus exercise 0: between runs of the same seed, one value per seed, without tests.
Heads of the GPSA layers, mean over seeds; non-locality: mean attention distance in patches."""
    header = ["exercise", "test accuracy", "minus exercise 0", "mean gate", "non-locality", "heads with gate < 0.5"]
    figure = Figure(figsize=(7, 1 + 0.32 * len(rows)), layout="constrained")
    plot_seeds(figure.subplots(), {title: result["accuracy"] for title, result in results.items()})
    save(out / "exercises", {"exercises": results}, markdown(header, rows), notes, figure, shown)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("numbers", nargs="*", type=int, help="exercises to train (default: all)")
    parser.add_argument("--seeds", type=number(int, 1), default=2, help="seeds per exercise (%(default)s)")
    parser.add_argument("--data-dir", default=Config.data_dir, help="see train_cifar.py (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/exercises"), help="folder (%(default)s)")
    run_main(train_exercises, **vars(parser.parse_args()))


if __name__ == "__main__":
    main()
