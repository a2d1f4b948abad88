"""Train the runs that compare ConViT with a plain ViT: five seeds of each, on 10% and on all of CIFAR-10.

    git worktree add ../worktree 2c4125a
    python -m experiments.evidence --code ../worktree --work ../runs

Start one process per CPU core; each trains with one thread. The code of commit 2c4125a, in the worktree, trains all
runs on the images in its data/cifar10; finished ones are appended to results/evidence/runs.jsonl. SIGTERM saves the
current run; the same command resumes it.

Design: accuracy after the last epoch, 10,000 steps of 32 images; subset, order, and augmentation are paired by seed.
The learning rate of each model and data fraction is chosen first, on a 10% validation split with a separate seed.
"""

import argparse
import os
from itertools import product
from pathlib import Path

from experiments.migrate import migrate
from experiments.sweep import RunSpec, Sweep, read_run, run_main

RUNS = Path(__file__).parent.parent / "results" / "evidence" / "runs.jsonl"
# flags of train_cifar.py at commit 2c4125a; experiments.migrate renames them in the finished runs
RECIPE = "--epoch-steps 2500 --amp bf16 --batch-size 32 --data-dir data/cifar10"
TUNING = "--seed 100 --hold-out 0.1 --epochs 2 --warmup-epochs 0.2"
FULL_LENGTH = "--epochs 4 --warmup-epochs 0.4"
MODELS = {"convit": "", "vit": "--gpsa-layers 0"}
LEARNING_RATES = [2.5e-4, 5e-4, 1e-3]
LR_FACTOR = 2  # extends the learning rates if the best is the lowest or the highest
SEEDS = range(5)
VARIANTS = {"gates-0.5": "--gating frozen --gate-init 0", "gates-0.73": "--gating frozen"}  # of ConViT, on 10%
PATTERNS = "--dataset patterns --data-fraction 0.25 --epochs 20 --batch-size 32 --shift 0 --no-flip --amp bf16"
PATTERN_SEEDS = range(3)
PATTERN_ARMS = {
    "learned": "",
    "vit": "--gpsa-layers 0",
    "gates-1": "--gating frozen --gate-init 20",
    "gates-0.73": "--gating frozen",
    "gates-0.5": "--gating frozen --gate-init 0",
    "gate-lr-1": "--gate-lr-scale 1",
    "gates-1-lr0.0003": "--gating frozen --gate-init 20 --lr 0.0003",  # does gates-1 only fail to optimize?
    "gates-1-lr0.003": "--gating frozen --gate-init 20 --lr 0.003",
}


def tuning_name(model: str, fraction: float, lr: float) -> str:
    return f"tune-{model}-{fraction:.0%}-lr{lr:g}"


def tune_learning_rate(model: str, fraction: float, records: dict[str, dict]) -> tuple[float | None, list[float]]:
    """The best learning rate (None while runs are missing), and all that have to be tried."""
    learning_rates = list(LEARNING_RATES)
    while True:
        runs = {lr: records.get(tuning_name(model, fraction, lr)) for lr in learning_rates}
        if not all(runs.values()):
            return None, learning_rates
        best = max(learning_rates, key=lambda lr: runs[lr]["metrics"][-1]["test_accuracy"])
        lowest, highest = learning_rates[0], learning_rates[-1]
        if best not in (lowest, highest):
            return best, learning_rates
        if best == lowest:
            learning_rates.insert(0, lowest / LR_FACTOR)
        else:
            learning_rates.append(highest * LR_FACTOR)


def plan(records: dict[str, dict]) -> list[RunSpec]:
    """All runs whose learning rate is known, the most important first."""
    runs, best_lr = [], {}

    def add(name: str, model: str, fraction: float, lr: float | None, *flags: str):
        if lr is not None:
            all_flags = [RECIPE, MODELS[model], f"--data-fraction {fraction} --lr {lr:g}", *flags]
            runs.append(RunSpec(name, " ".join(all_flags).split()))

    for fraction in (
        0.1,
        1.0,
    ):  # a fraction whole before the next, so that an unfinished grid has a finished comparison
        for model in MODELS:
            best_lr[model, fraction], learning_rates = tune_learning_rate(model, fraction, records)
            for lr in learning_rates:
                add(tuning_name(model, fraction, lr), model, fraction, lr, TUNING)
        for seed, model in product(SEEDS, MODELS):
            name = f"{model}-{fraction:.0%}-seed{seed}"
            add(name, model, fraction, best_lr[model, fraction], f"--seed {seed}", FULL_LENGTH)
    for seed, (name, variant) in product(SEEDS, VARIANTS.items()):
        add(f"{name}-10%-seed{seed}", "convit", 0.1, best_lr["convit", 0.1], variant, f"--seed {seed}", FULL_LENGTH)
    for seed, (name, arm) in product(PATTERN_SEEDS, PATTERN_ARMS.items()):
        runs.append(RunSpec(f"patterns-{name}-seed{seed}", [*PATTERNS.split(), *arm.split(), "--seed", str(seed)]))
    for seed, model in product(SEEDS, MODELS):
        name, lr = f"{model}-pool-mean-10%-seed{seed}", best_lr[model, 0.1]
        add(name, model, 0.1, lr, "--pool mean", f"--seed {seed}", FULL_LENGTH)
    return runs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, required=True, help="worktree whose train_cifar.py trains the runs")
    parser.add_argument("--work", type=Path, required=True, help="folder of unfinished runs, outside the project")
    parser.add_argument("--list", action="store_true", help="print which runs are finished, and exit")
    args = parser.parse_args()
    sweep = Sweep(RUNS, args.work, read=lambda folder: migrate(read_run(folder)))
    if args.list:
        records = sweep.records()
        for run in plan(records):
            print("done" if run.name in records else "todo", run.name, *run.flags)
        return
    os.nice(10)
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    while sweep.train_next(plan(sweep.records()), lambda run: args.code, cwd=args.code):
        pass


if __name__ == "__main__":
    run_main(main)
