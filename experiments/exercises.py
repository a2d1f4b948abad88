"""Do the exercises of EXERCISES.md: train the model with each change, and put what comes out into one table.

    python exercises.py                 all that are not done yet, two seeds each: about an hour on two CPU cores
    python exercises.py 3 8 --seeds 1   some of them

The changes are those in the text: every ```diff of a section is made in a copy of the code, never in your own, and the
section's command is run there. So an exercise of yours is one more section. What is finished is kept in
results/reproduce/exercises/runs/; a call that was stopped or killed goes on with the same command.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM, signal

import numpy as np

from analysis import read_metrics
from results import report
from train_cifar import Config
from training.flags import at_least

CODE = Path(__file__).parent
LESSON = CODE / "EXERCISES.md"


@dataclass(frozen=True)
class Exercise:
    """A section of the lesson."""

    number: int  # 0 is the model as it stands
    title: str
    change: str  # the text of its diffs
    flags: list[str]  # of train_cifar.py, with those of the recipe that all share

    def folder(self, seed: int) -> Path:
        """Where its run with this seed is kept."""
        return report.RESULTS / "exercises" / "runs" / f"{self.number}_seed={seed}"


def read_lesson(text: str) -> list[Exercise]:
    """The exercises of a text, in their order. Raises ValueError where one has no command."""
    recipe = re.search(r'RECIPE="(.*)"', text)
    _, *parts = re.split(r"^## (\d+)\. (.+)\n", text, flags=re.MULTILINE)
    exercises = []
    for number, title, section in zip(parts[0::3], parts[1::3], parts[2::3], strict=True):
        command = re.search(r"python train_cifar\.py \$RECIPE(.*)", section)
        if not recipe or not command:
            raise ValueError(f"exercise {number} needs a command, python train_cifar.py $RECIPE ..., and a RECIPE=")
        own = re.sub(r"--run \S+", "", command[1])
        change = "@@\n".join(re.findall(r"^```diff\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL))
        exercises.append(Exercise(int(number), title, change, shlex.split(recipe[1] + own)))
    return exercises


def changed(source: str, change: str) -> str:
    """A source with a diff made in it, part by part. Raises ValueError where a part is not found, or found twice."""
    for part in filter(None, re.split(r"^@@.*\n", change, flags=re.MULTILINE)):
        lines = [(line[:1], line[1:]) for line in part.splitlines(keepends=True)]
        before = "".join(text for sign, text in lines if sign != "+")
        after = "".join(text for sign, text in lines if sign != "-")
        if source.count(before) != 1:
            raise ValueError(f"convit_min.py has these lines {source.count(before)} times, not once:\n{before}")
        source = source.replace(before, after)
    return source


def finished(exercise: Exercise, seed: int) -> bool:
    """Whether a run has come to its end. Raises ValueError where its folder holds one of another change or command."""
    run, note = exercise.folder(seed), describe(exercise)
    if not (run / "metrics.jsonl").exists():
        return False
    if (run / "exercise.txt").read_text() != note:
        raise ValueError(f"exercise {exercise.number} is not what it was when {run} began: move that folder away")
    return report.ended(run)


def describe(exercise: Exercise) -> str:
    """What makes up an exercise, as it is kept beside its runs."""
    return f"{shlex.join(exercise.flags)}\n{exercise.change}"


def train(exercise: Exercise, seed: int, data_dir: str):
    """Train a run, or go on with it, in a copy of the code with the exercise's change. Ends the process if it fails."""
    run = exercise.folder(seed)
    source = changed((CODE / "convit_min.py").read_text(), exercise.change)
    run.mkdir(parents=True, exist_ok=True)
    (run / "exercise.txt").write_text(describe(exercise))
    with tempfile.TemporaryDirectory() as place:
        for file in CODE.glob("*.py"):
            shutil.copy(file, place)
        shutil.copytree(CODE / "training", Path(place) / "training")
        (Path(place) / "convit_min.py").write_text(source)
        flags = [*exercise.flags, "--seed", str(seed), "--data-dir", data_dir, "--run", str(run)]
        resume = ["--resume"] if (run / "last.pt").exists() else []
        with subprocess.Popen([sys.executable, f"{place}/train_cifar.py", *flags, *resume]) as process:
            signal(SIGINT, lambda *_: None)  # Ctrl-C reaches the run, too: it saves what it has, and ends
            signal(SIGTERM, lambda *_: process.terminate())
    if process.returncode:
        raise SystemExit(f"exercises.py: exercise {exercise.number} was not finished; {report.KEPT}")


def write_table(exercises: list[Exercise], seeds: int):
    """Write table, picture and numbers of all exercises, from the seeds that are finished."""
    cells, made = {}, []
    for exercise in exercises:
        runs = [exercise.folder(seed) for seed in range(seeds) if finished(exercise, seed)]
        if runs:
            cells[f"{exercise.number}. {exercise.title}", "10%"] = report.outcome(runs) | heads_after(runs)
            made += [entry for run in runs for entry in json.loads((run / "provenance.json").read_text())]
    table = []
    for (title, _), cell in cells.items():
        table.append([title, report.spell(cell), *(f"{cell[key]:.2f}" for key in ("mean_gate", "non_locality"))])
        table[-1].append(f"{cell['left']:.1f}")
    head = ["exercise", "test accuracy", "mean gate", "non-locality", "heads that left (gate < 0.5)"]
    lines = [
        *report.markdown(head, table),
        "",
        "Accuracy (%) after the last step: mean ± standard deviation over the seeds (their number). Gate, non-locality "
        "(mean attended distance in patches) and heads are of the GPSA layers, means over the seeds.",
    ]
    record = {"exercises": [{"exercise": title} | cell for (title, _), cell in cells.items()]}
    report.save("exercises/exercises", record, lines, made, report.draw_ablation(cells))


def heads_after(runs: list[Path]) -> dict:
    """What the gated heads of these runs are like at their end: means over heads and runs, and how many have left."""
    last = [read_metrics(run)[-1]["heads"] for run in runs]
    gates, distances = (np.array([line[key] for line in last], dtype=float) for key in ("gate", "non_locality"))
    gated = ~np.isnan(gates)
    left = (gates[gated] < 0.5).sum() / len(runs)
    return {"mean_gate": gates[gated].mean(), "non_locality": distances[gated].mean(), "left": left}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("numbers", nargs="*", type=int, help="of the exercises; by default all")
    parser.add_argument("--seeds", type=at_least(1), default=2, help="seeds of each (%(default)s)")
    parser.add_argument("--data-dir", default=Config.data_dir, help="as that of train_cifar.py (%(default)s)")
    given = parser.parse_args()
    try:
        exercises = read_lesson(LESSON.read_text())
        known = [exercise.number for exercise in exercises]
        if not set(given.numbers) <= set(known):
            raise ValueError(f"{LESSON.name} has the exercises {', '.join(map(str, known))}")
        waiting = [
            (seed, exercise) for seed in range(given.seeds) for exercise in exercises if not finished(exercise, seed)
        ]
        for seed, exercise in waiting:
            if exercise.number in (given.numbers or known):
                print(f"\n{exercise.number}. {exercise.title}, seed {seed}", flush=True)
                train(exercise, seed, given.data_dir)
        write_table(exercises, given.seeds)
    except (OSError, ValueError) as problem:
        sys.exit(f"exercises.py: {problem}")


if __name__ == "__main__":
    main()
