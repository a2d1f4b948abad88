"""Train the grid of runs behind the comparison of ConViT with a plain ViT, one missing run after another.

    python -m experiments.grid --code ../grid-1 --work ../grid-runs

Start it once per lane: each lane is one process with one thread. Runs are trained by the code of a worktree, so that
all of them come from one commit; finished ones are appended to results/grid/runs.jsonl (config, provenance, metrics),
and whatever is in that file is not trained again. Stop a lane with SIGTERM: the run is saved and resumed next time.

The design: final-epoch accuracy, 10,000 steps of 32 images, subset, order and augmentation paired by seed. Learning
rates are chosen first, on a 10% validation split with a seed of its own.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

RUNS = Path(__file__).parent.parent / "results" / "grid" / "runs.jsonl"
RECIPE = "--epoch-steps 2500 --amp bf16 --batch-size 32 --data-dir data/cifar10"
MODELS = {"convit": "", "vit": "--gpsa-layers 0"}
LEARNING_RATES = [2.5e-4, 5e-4, 1e-3]
FACTOR = 2  # the grid of learning rates is extended by this factor where the best one is at an edge
SEEDS = range(5)
VARIANTS = {  # of ConViT, on 10% of the images
    "gates-0.5": "--gating frozen --gate-init 0",
    "gates-0.73": "--gating frozen",
}


def load_runs() -> dict[str, dict]:
    """All finished runs by name."""
    lines = RUNS.read_text().splitlines() if RUNS.exists() else []
    return {run["name"]: run for run in map(json.loads, lines)}


def tuning_name(model: str, fraction: float, lr: float) -> str:
    return f"tune-{model}-{fraction:.0%}-lr{lr:g}"


def accuracy(run: dict) -> float:
    """Accuracy after the last epoch, in percent."""
    return run["metrics"][-1]["test_accuracy"]


def tuned_learning_rates(model: str, fraction: float, done: dict[str, dict]) -> tuple[float | None, list[float]]:
    """The best learning rate (None while runs are missing), and all that have to be tried."""
    rates = list(LEARNING_RATES)
    while True:
        runs = {lr: done.get(tuning_name(model, fraction, lr)) for lr in rates}
        if not all(runs.values()):
            return None, rates
        best = max(rates, key=lambda lr: accuracy(runs[lr]))
        if best not in (rates[0], rates[-1]):
            return best, rates
        rates = [rates[0] / FACTOR, *rates] if best == rates[0] else [*rates, rates[-1] * FACTOR]


def plan(done: dict[str, dict]) -> dict[str, str]:
    """Name -> flags of every run that can be trained by now, in the order of importance."""
    runs, best = {}, {}
    tuning = "--seed 100 --hold-out 0.1 --epochs 2 --warmup-epochs 0.2"
    full = "--epochs 4 --warmup-epochs 0.4"
    for fraction, model in product((0.1, 1.0), MODELS):
        best[model, fraction], rates = tuned_learning_rates(model, fraction, done)
        for lr in rates:
            name = tuning_name(model, fraction, lr)
            runs[name] = f"{MODELS[model]} --data-fraction {fraction} --lr {lr:g} {tuning}"

    def add(name: str, model: str, fraction: float, seed: int, change: str = ""):
        if best[model, fraction] is not None:
            flags = f"{MODELS[model]} {change} --data-fraction {fraction} --lr {best[model, fraction]:g} --seed {seed}"
            runs[f"{name}-{fraction:.0%}-seed{seed}"] = f"{flags} {full}"

    for fraction, seed, model in product((0.1, 1.0), SEEDS, MODELS):
        add(model, model, fraction, seed)
    for seed, (name, change) in product(SEEDS, VARIANTS.items()):
        add(name, "convit", 0.1, seed, change)
    for seed, model in product(SEEDS, MODELS):
        add(f"{model}-pool-mean", model, 0.1, seed, "--pool mean")
    return runs


def claim(name: str, work: Path) -> int | None:
    """Lock a run for this lane; None if another lane has it."""
    descriptor = os.open(work / f"{name}.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def train(name: str, flags: str, code: Path, work: Path):
    """Train a run, or resume it, and append it to runs.jsonl."""
    folder = work / name
    resume = ["--resume"] if (folder / "last.pt").exists() else []
    folder_seen_by_code = os.path.relpath(folder, code)
    command = ["nice", sys.executable, "train_cifar.py", *RECIPE.split(), *flags.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen([*command, "--run", folder_seen_by_code, *resume], cwd=code, env=environment)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.terminate())
    if process.wait():
        sys.exit(process.returncode)
    record = {
        "name": name,
        "config": json.loads((folder / "config.json").read_text()),
        "provenance": json.loads((folder / "provenance.json").read_text()),
        "metrics": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
    }
    RUNS.parent.mkdir(parents=True, exist_ok=True)
    with open(RUNS, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(record) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, required=True, help="worktree whose train_cifar.py trains the runs")
    parser.add_argument("--work", type=Path, required=True, help="folder for unfinished runs, outside the project")
    parser.add_argument("--list", action="store_true", help="print the runs and whether they are finished, and exit")
    args = parser.parse_args()
    if args.list:
        done = load_runs()
        for name, flags in plan(done).items():
            print(f"{'done' if name in done else 'todo'}  {name}  {' '.join(flags.split())}")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    while True:
        done = load_runs()
        for name, flags in plan(done).items():
            if name not in done and (lock := claim(name, args.work)) is not None:
                if name not in load_runs():  # another lane may just have finished it
                    print(f"--- {name}", flush=True)
                    train(name, flags, args.code.resolve(), args.work.resolve())
                os.close(lock)
                break
        else:
            if all(name in done for name in plan(done)):
                return
            time.sleep(30)  # another lane trains what is left, and its results may ask for more


if __name__ == "__main__":
    main()
