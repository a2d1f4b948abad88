"""Reproduce the tables and figures of the ConViT paper on CIFAR-10, or on any folder of small images.

    python -m experiments.reproduce all             Tables 2 and 3 and Fig. 8: two hours of one core, plus evaluation
    python -m experiments.reproduce gates           Figs. 5 to 7 of demo/cifar10, or of a different --run; trains none
    python -m experiments.reproduce compare DIR     a table and a plot of the runs in DIR/runs.jsonl

All runs have the same number of steps, and one learning rate, which is chosen first, on a validation split. Use --amp
off on CPUs without bf16 support and --budget gpu on a GPU. Rerun the same command to resume an interrupted sweep.
Tables, plots, and finished runs (runs.jsonl) go to --out (results/reproduce/), unfinished runs to runs/sweeps/.
"""

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from analysis import gates, read_metrics
from convit_min import MODELS, ConViT
from experiments import report
from experiments.sweep import CODE, WORK, RunSpec, Sweep, read_run, run_main
from images import normalize
from train_cifar import Config
from training.config import as_flags, int_at_least
from training.data import DATASETS, ImageSet, InMemoryData, eval_batches, infer_dataset, sample_indices
from training.distributed import UserError
from training.evaluation import evaluate
from training.optim import AMP_DTYPES
from weights import open_model, snapshot_files

DEMO = CODE / "demo" / "cifar10"


@dataclass(frozen=True)
class Budget:
    """The size of the runs. All have epochs x steps_per_epoch steps, on any fraction of the images."""

    seeds: int
    shared_seeds: int  # of ConViT and plain ViT on 10%, which all three tables share: they measure seed noise
    lr_epochs: int  # of the runs that choose the learning rate
    config: dict  # fields of Config


# fmt: off
BUDGETS = {
    "smoke": Budget(1, 2, 1, {  # for tests
        "model": "convit_cifar_nano", "batch_size": 4, "steps_per_epoch": 3, "epochs": 2, "img_size": 16}),
    "laptop": Budget(1, 2, 1, {
        "model": "convit_cifar_nano", "batch_size": 32, "steps_per_epoch": 500, "epochs": 4, "amp": "bf16"}),
    "gpu": Budget(3, 3, 5, {
        "model": "convit_cifar", "batch_size": 512, "steps_per_epoch": 1000, "epochs": 20, "amp": "bf16",
        "device": "cuda", "compile": True}),
}
# fmt: on

LEARNING_RATES = [5e-4, 1e-3, 2e-3]
PLAIN = {"gpsa_layers": 0}
NO_GATING = {"gating": "frozen", "gate_init": 0.0}
NO_CONV_INIT = {"conv_init": False}
ABLATIONS = {
    "full ConViT": {},
    "no gating": NO_GATING,
    "no conv init": NO_CONV_INIT,
    "neither": NO_GATING | NO_CONV_INIT,
    "plain ViT": PLAIN,
    "GPSA frozen at conv init": {"freeze_gpsa": True},
    "GPSA frozen at random": {"freeze_gpsa": True} | NO_CONV_INIT,
    "gates frozen at 0.73": {"gating": "frozen"},  # not in the paper
}
TABLES = ["sample-efficiency", "ablation", "locality"]


def tables(budget: Budget) -> dict[str, dict[tuple[str, str], dict]]:
    """By table and (row, column), the fields of Config that distinguish the runs of a cell."""
    base = MODELS[budget.config["model"]]
    layer_counts = sorted({0, round(base.depth / 3), round(2 * base.depth / 3), base.gpsa_layers})
    models = {"ConViT": {}, "plain ViT": PLAIN}
    tenth = {"data_fraction": 0.1}
    tuning = tenth | {"val_fraction": 0.1, "epochs": budget.lr_epochs}

    def locality_settings(layers: int, strength: float) -> dict:
        """Without the defaults, so that the full ConViT and the plain ViT are the runs of other tables."""
        settings = {} if layers == base.gpsa_layers else {"gpsa_layers": layers}
        return settings if strength == 1 or layers == 0 else settings | {"locality_strength": strength}

    # fmt: off
    return {
        "learning-rate": {(f"{lr:g}", name): tuning | model | {"lr": lr}
                          for lr in LEARNING_RATES for name, model in models.items()},
        "sample-efficiency": {(f"{fraction:.0%}", name): {"data_fraction": fraction} | model
                              for fraction in (0.05, 0.1, 0.3, 1.0) for name, model in models.items()},
        "ablation": {(name, f"{fraction:.0%}"): {"data_fraction": fraction} | change
                     for name, change in ABLATIONS.items() for fraction in (1.0, 0.1)},
        "locality": {(f"{layers} GPSA layers", f"strength {strength:g}"): tenth | locality_settings(layers, strength)
                     for layers in layer_counts for strength in (0.01, 0.1, 1.0)},
    }
    # fmt: on


def seed_runs(settings: dict, lr: float | None, args: argparse.Namespace) -> list[RunSpec]:
    """The runs of a cell, one per seed: the recipe of the budget with these settings. Their flags make up the name."""
    budget = BUDGETS[args.budget]
    is_shared = settings in ({"data_fraction": 0.1}, {"data_fraction": 0.1} | PLAIN)
    runs = []
    for seed in range(args.seeds or (budget.shared_seeds if is_shared else budget.seeds)):
        run_settings = settings | {"lr": settings.get("lr", lr), "seed": seed}
        config = {"dataset": args.dataset, "data_dir": args.data_dir} | budget.config | run_settings
        config |= {"warmup_epochs": config["epochs"] / 10} | ({"amp": args.amp} if args.amp else {})
        name = "_".join(flag.removeprefix("--") for flag in as_flags(run_settings))
        runs.append(RunSpec(name, as_flags(config), config))
    return runs


def train_tables(names: list[str], lr: float | None, args: argparse.Namespace) -> dict[str, dict]:
    """Train all runs of some tables and write the tables; return the cells of each."""
    all_tables, folder = tables(BUDGETS[args.budget]), args.out / args.budget
    runs = {
        name: {cell: seed_runs(settings, lr, args) for cell, settings in all_tables[name].items()} for name in names
    }
    distinct = list({run.name: run for table in runs.values() for cell in table.values() for run in cell}.values())
    sweep = Sweep(folder / "runs.jsonl", WORK / args.budget)
    print(f"{', '.join(names)} ({args.budget})", flush=True)
    if sweep.missing(distinct) and not args.dataset:
        infer_dataset(args.data_dir, Config.data_dir)  # raises before any run starts
    while sweep.train_next(distinct):
        pass
    records, cells = sweep.records(), {}
    for name, table in runs.items():
        trained = {cell: [records[run.name] for run in seeds] for cell, seeds in table.items()}
        cells[name] = report.write_table(name, trained, folder / name)
    return cells


def reproduce(args: argparse.Namespace):
    """Train and write tables; without --lr, first choose the learning rate that is best for both models together."""
    lr = args.lr
    if lr is None:
        cells = train_tables(["learning-rate"], None, args)["learning-rate"]
        lr = max(LEARNING_RATES, key=lambda lr: sum(cells[f"{lr:g}", name]["mean"] for name in ("ConViT", "plain ViT")))
        print(f"learning rate: {lr:g}\n")
    train_tables(TABLES if args.command == "all" else [args.command], lr, args)


def open_snapshots(run: Path) -> list[ConViT]:
    """The models of a run's first and last snapshot."""
    files = snapshot_files(run)
    if not files:
        raise UserError(f"{run} has no snapshots; pass a run folder of train_cifar.py as --run")
    try:
        return [open_model(file) for file in (files[0], files[-1])]
    except ValueError as error:
        raise UserError(str(error)) from error


def load_test_set(model: ConViT, args: argparse.Namespace) -> ImageSet:
    """The test set of --data-dir at the image size of a model. Raises UserError if the classes differ in number."""
    config = Config(dataset=args.dataset, data_dir=args.data_dir, img_size=model.config.img_size, eval=True)
    test_set = InMemoryData(config, torch.device(config.device), model.crop_pct).test
    found, expected = len(test_set.classes), model.config.num_classes
    if found != expected:
        raise UserError(f"{args.data_dir} has {found} classes, but {args.run} was trained on {expected}")
    return test_set


@torch.no_grad()
def show_gates(args: argparse.Namespace):
    """Gates and non-locality over a run, and the attention of the center patch before and after training."""
    snapshots = open_snapshots(args.run)
    config = snapshots[-1].config
    rows, columns = config.grid
    if config.gpsa_layers == 0:
        raise UserError(f"{args.run} is a plain ViT: it has no gates")
    images = load_test_set(snapshots[-1], args).images
    sample_images = normalize(images[sample_indices(len(images))]).cpu()
    center, maps = rows // 2 * columns + columns // 2, {}
    for model in snapshots:
        attention = model(sample_images, return_attention=True)[1][: config.gpsa_layers]
        from_center = torch.stack([layer.mixed[:, :, center].mean(0) for layer in attention])
        maps[f"epoch {model.epoch}"] = gates(model)[: config.gpsa_layers], from_center.unflatten(2, (rows, columns))
    report.write_gates(args.run.name, read_metrics(args.run), config.grid, maps, images.device, args.out)


def masked(model: ConViT, pos_embed: bool = False, content: int = 0, position: int = 0) -> ConViT:
    """A copy of a model without its position embedding, or without content or position in its first layers."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        if pos_embed:
            model.pos_embed.zero_()
        for block in model.blocks[:content]:
            block.attn.gating_param.fill_(math.inf)  # a gate of exactly 1: position only
        for block in model.blocks[:position]:
            block.attn.gating_param.fill_(-math.inf)
    return model


def show_masking(args: argparse.Namespace):
    """Test accuracy of a run's last snapshot, unchanged and with parts of it masked."""
    model = open_snapshots(args.run)[-1]
    test_set = load_test_set(model, args)
    device = test_set.images.device

    def accuracy(**parts) -> float:
        print(".", end="", flush=True)
        return evaluate(masked(model, **parts).to(device), eval_batches(test_set, 256), device, "off")["test_accuracy"]

    unmasked, without_pos_embed = accuracy(), accuracy(pos_embed=True)
    layers = range(1, model.config.gpsa_layers + 1)
    curves = {part: [unmasked, *(accuracy(**{part: count}) for count in layers)] for part in ("content", "position")}
    report.write_masking(f"{args.run.name}, epoch {model.epoch}", without_pos_embed, curves, device, args.out)


def show_comparison(args: argparse.Namespace):
    """Table and plot of the finished runs of a sweep, next to those of some run folders."""
    records = list(Sweep(args.folder / "runs.jsonl", WORK).records().values())
    if not records:
        raise UserError(f"{args.folder} has no runs.jsonl with finished runs")
    for run in args.runs:
        if not (run / "metrics.jsonl").exists():
            raise UserError(f"{run} is not a run folder of train_cifar.py")
    report.compare([read_run(run) for run in args.runs] + records, args.folder)


COMMANDS = {
    "sample-efficiency": (reproduce, "ConViT and a plain ViT on four fractions of the images (Table 2)"),
    "ablation": (reproduce, "ConViT without some of its parts, on all images and on a tenth (Table 3)"),
    "locality": (
        reproduce,
        "number of GPSA layers, locality strength of their init, on a tenth of the images (Fig. 8)",
    ),
    "all": (reproduce, "the three above; runs that they share are trained once"),
    "gates": (show_gates, "gates, non-locality, and attention maps of a run (Figs. 5 to 7)"),
    "masking": (show_masking, "accuracy of a run with parts masked (Tables 5 and 6)"),
    "compare": (show_comparison, "table and plot of the finished runs of any sweep"),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (function, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if function is show_comparison:
            command.add_argument("folder", type=Path, help="has runs.jsonl; gets README.md and compare.png")
            command.add_argument("runs", type=Path, nargs="*", help="run folders to include")
            continue
        command.add_argument("--data-dir", default=Config.data_dir, help="see train_cifar.py (%(default)s)")
        command.add_argument("--dataset", choices=DATASETS, help="default: inferred from --data-dir")
        command.add_argument("--out", type=Path, default=report.RESULTS, help="folder to write (%(default)s)")
        if function is reproduce:
            command.add_argument("--budget", choices=BUDGETS, default="laptop", help="size of the runs (%(default)s)")
            command.add_argument("--seeds", type=int_at_least(1), help="seeds of every run (default: the budget's)")
            command.add_argument("--lr", type=float, help="learning rate (default: best on a validation split)")
            command.add_argument("--amp", choices=AMP_DTYPES, help="mixed precision (default: the budget's)")
        else:
            command.add_argument("--run", type=Path, default=DEMO, help="run folder of train_cifar.py (demo/cifar10)")
    args = parser.parse_args()
    run_main(COMMANDS[args.command][0], args)


if __name__ == "__main__":
    main()
