"""The grid: the runs that compare ConViT with a plain ViT on 10% and on all of CIFAR-10, and with frozen gates.

Runs with the same seed are paired: same images, in the same order, with the same augmentation. Each has 10,000 steps of
32 images. The learning rate of each model and data fraction is chosen first, on a 10% validation split, with a separate
seed. Only the test accuracy after the last step is compared, in the contrasts below.
"""

import os
from itertools import product
from pathlib import Path

from experiments.sweep import Plan, read_runs, train_sweep

RECIPE = "--steps-per-epoch 2500 --amp bf16 --batch-size 32"
TUNING = "--seed 100 --val-fraction 0.1 --epochs 2 --warmup-epochs 0.2"
FULL_LENGTH = "--epochs 4 --warmup-epochs 0.4"
FRACTIONS = (0.1, 1.0)  # one whole before the next, so that an unfinished grid already has a finished comparison
MODELS = {"convit": "", "vit": "--gpsa-layers 0"}
LEARNING_RATES = [2.5e-4, 5e-4, 1e-3]  # extended by factors of 2 if the best is the lowest or the highest
SEEDS = range(5)
VARIANTS = {"gates-0.5": "--gating frozen --gate-init 0", "gates-0.73": "--gating frozen"}  # of ConViT, on 10%
# in fp32 (on a GPU: TF32), so that no arm fails for lack of precision
PATTERNS = "--dataset patterns --data-fraction 0.25 --epochs 20 --batch-size 32 --crop-padding 0 --no-hflip"
PATTERN_SEEDS = range(3)
PATTERN_ARMS = {
    "learned": "",
    "vit": MODELS["vit"],
    **VARIANTS,
    "gates-1": "--gating frozen --gate-init 20",
    "gate-lr-1": "--gate-lr-scale 1",
    "gates-1-lr0.0003": "--gating frozen --gate-init 20 --lr 0.0003",  # does gates-1 only fail to optimize?
    "gates-1-lr0.003": "--gating frozen --gate-init 20 --lr 0.003",
}
CONTRASTS = {  # sums of the accuracy of settings, with these signs
    "ConViT - plain ViT, 10%": {("convit", "10%"): 1, ("vit", "10%"): -1},
    "lead on 10% - on 100%": {("convit", "10%"): 1, ("vit", "10%"): -1, ("convit", "100%"): -1, ("vit", "100%"): 1},
    "ConViT - gates frozen at 0.5, 10%": {("convit", "10%"): 1, ("gates-0.5", "10%"): -1},
    "ConViT - gates frozen at 0.73, 10%": {("convit", "10%"): 1, ("gates-0.73", "10%"): -1},
}


def tuning_name(model: str, fraction: float, lr: float) -> str:
    """The name of a run that tries a learning rate."""
    return f"tune-{model}-{fraction:.0%}-lr{lr:g}"


def tune_learning_rate(model: str, fraction: float, records: dict[str, dict]) -> tuple[float | None, list[float]]:
    """The best learning rate (None while runs are missing), and all to try: at least half and twice the best one."""
    learning_rates = set(LEARNING_RATES)
    while True:
        names = {lr: tuning_name(model, fraction, lr) for lr in sorted(learning_rates)}
        if not records.keys() >= set(names.values()):
            return None, list(names)
        best = max(names, key=lambda lr: records[names[lr]]["metrics"][-1]["test_accuracy"])
        if learning_rates >= {best / 2, best * 2}:
            return best, list(names)
        learning_rates |= {best / 2, best * 2}


def make_plan(records: dict[str, dict]) -> Plan:
    """All runs, the most important first. A run whose learning rate is not chosen yet has no flags."""
    plan, best_lr = {}, {}

    def add(name: str, model: str, fraction: float, lr: float | None, flags: str):
        plan[name] = f"{RECIPE} {MODELS[model]} --data-fraction {fraction} --lr {lr} {flags}".split() if lr else []

    for fraction in FRACTIONS:
        for model in MODELS:
            best_lr[model, fraction], learning_rates = tune_learning_rate(model, fraction, records)
            for lr in learning_rates:
                add(tuning_name(model, fraction, lr), model, fraction, lr, TUNING)
        for seed, model in product(SEEDS, MODELS):
            name, lr = f"{model}-{fraction:.0%}-seed{seed}", best_lr[model, fraction]
            add(name, model, fraction, lr, f"--seed {seed} {FULL_LENGTH}")
    for seed, (name, variant) in product(SEEDS, VARIANTS.items()):
        add(f"{name}-10%-seed{seed}", "convit", 0.1, best_lr["convit", 0.1], f"{variant} --seed {seed} {FULL_LENGTH}")
    for seed, (name, arm) in product(PATTERN_SEEDS, PATTERN_ARMS.items()):
        plan[f"patterns-{name}-seed{seed}"] = f"{PATTERNS} {arm} --seed {seed}".split()
    for seed, model in product(SEEDS, MODELS):
        name, lr = f"{model}-pool-mean-10%-seed{seed}", best_lr[model, 0.1]
        add(name, model, 0.1, lr, f"--pool mean --seed {seed} {FULL_LENGTH}")
    return plan


def train(out: Path, data_dir: str, compile: bool, list_only: bool):
    """Train the missing runs, each with one thread."""
    here = ["--data-dir", data_dir, *["--compile"] * compile]  # of this machine, so not part of the plan

    def plan(records: dict[str, dict]) -> Plan:
        return {name: flags and [*flags, *here] for name, flags in make_plan(records).items()}

    if list_only:
        records = read_runs(out / "runs.jsonl")
        for name, flags in plan(records).items():
            print("done" if name in records else "todo" if flags else "wait", name, *flags)
        return
    if hasattr(os, "nice"):  # Windows lacks it; there, train_sweep says that it cannot train
        os.nice(10)
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    train_sweep(out, plan)
