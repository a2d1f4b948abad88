"""Reproduce the tables and figures of the ConViT paper on CIFAR-10, or on any folder of small pictures.

    python reproduce.py sample-efficiency       Table 2: ConViT and a plain ViT on 5, 10, 30 and 100% of the pictures
    python reproduce.py ablation                Table 3: without gating, without convolutional init, GPSA frozen ...
    python reproduce.py locality                Fig. 8: number of GPSA layers, strength of the convolutional init
    python reproduce.py all                     all three; a run that several of them need is trained once
    python reproduce.py gates --run DIR         Figs. 5 to 7 of any run, by default demo/; nothing is trained
    python reproduce.py masking --run DIR       Tables 5 and 6 of any run, by default demo/; nothing is trained

The first four train grids of runs of train_cifar.py, all of the same number of steps: an hour and a half in all on two
CPU cores (--amp off where they lack bf16); --scale gpu is for one GPU. The learning rate, one for all runs, is chosen
first, on pictures held back from the training set. A grid that was stopped or killed goes on with the same command.
Tables, plots and JSON go to results/reproduce/, and there the runs, named by their flags; what they measured is kept
with the code, so that a grid can go on elsewhere.
"""

import argparse
import copy
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGINT, SIGTERM, getsignal, signal

import torch

import train_cifar
from analysis import gates, read_metrics
from convit_min import MODELS, ConViT, normalise
from results import report
from train_cifar import Config
from training.data import DATASETS, Pictures, guess_dataset, load_pictures, test_batches
from training.flags import as_flags, at_least
from training.loop import AMP_DTYPES, evaluate
from viewer.probe import open_snapshot, snapshots

DEMO = Path(__file__).parent / "demo"


@dataclass(frozen=True)
class Scale:
    """How large the grids are run. Every run has epochs x epoch_steps steps, whatever its share of the pictures."""

    model: str  # the plain ViT is the same with --gpsa-layers 0
    batch_size: int
    epoch_steps: int  # accuracy and heads are measured this often
    epochs: int
    rate_epochs: int  # of the runs that choose the learning rate
    seeds: int
    shared_seeds: int  # of ConViT and plain ViT on 10%, which all three grids have: they tell how large chance is
    how: dict = field(default_factory=dict)  # other fields of Config


# fmt: off
SCALES = {
    "smoke":  Scale("convit_cifar_nano",   4,    3,  2, 1, 1, 2, {"img_size": 16}),  # for tests
    "laptop": Scale("convit_cifar_nano",  32,  500,  4, 1, 1, 2, {"amp": "bf16"}),
    "gpu":    Scale("convit_cifar",      512, 1000, 20, 5, 3, 3, {"device": "cuda", "amp": "bf16", "compile": True}),
}
# fmt: on

RATES = [5e-4, 1e-3, 2e-3]
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
    "gates frozen at 0.73": {"gating": "frozen"},  # not in the paper: no gating, but from the gates of the init
}


def grids(scale: Scale) -> dict[str, dict[tuple[str, str], dict]]:
    """By name, for every (row, column) of a table, the fields of Config that tell its runs from those of others."""
    depth, full = MODELS[scale.model].depth, MODELS[scale.model].gpsa_layers  # all but two
    layers = sorted({0, round(depth / 3), round(2 * depth / 3), full})  # of 7, two thirds and all but two are both 5
    both = {"ConViT": {}, "plain ViT": PLAIN}
    tenth = {"data_fraction": 0.1}
    short = tenth | {"hold_out": 0.1, "epochs": scale.rate_epochs}
    # fmt: off
    return {
        "learning-rate": {(f"{rate:g}", name): short | kind | {"lr": rate}
                          for rate in RATES for name, kind in both.items()},
        "sample-efficiency": {(f"{share:.0%}", name): {"data_fraction": share} | kind
                              for share in (0.05, 0.1, 0.3, 1.0) for name, kind in both.items()},
        "ablation": {(name, f"{share:.0%}"): {"data_fraction": share} | change
                     for name, change in ABLATIONS.items() for share in (1.0, 0.1)},
        "locality": {(f"{number} GPSA layers", f"strength {alpha:g}"): tenth | local(number, alpha, full)
                     for number in layers for alpha in (0.01, 0.1, 1.0)},
    }
    # fmt: on


def local(layers: int, strength: float, full: int) -> dict:
    """That many GPSA layers of that strength, named so that the full ConViT and the plain ViT are what they are."""
    if layers == 0:
        return PLAIN
    fewer = {} if layers == full else {"gpsa_layers": layers}
    return fewer if strength == 1 else fewer | {"locality_strength": strength}


def runs_of(change: dict, rate: float | None, given: argparse.Namespace) -> list[dict]:
    """The fields of Config for every seed: the recipe of the scale but for `change`. Flags make the folder's name."""
    scale, runs = SCALES[given.scale], []
    shared = change in ({"data_fraction": 0.1}, {"data_fraction": 0.1} | PLAIN)
    for seed in range(given.seeds or (scale.shared_seeds if shared else scale.seeds)):
        own = change | {"lr": change.get("lr", rate), "seed": seed}
        name = "_".join(flag.removeprefix("--") for flag in as_flags(own))
        fields = {"dataset": given.dataset, "data_dir": given.data_dir, "model": scale.model} | scale.how
        fields |= {"batch_size": scale.batch_size, "epoch_steps": scale.epoch_steps, "epochs": scale.epochs} | own
        fields |= {"amp": given.amp} if given.amp else {}
        runs.append(
            fields | {"warmup_epochs": fields["epochs"] / 10, "run": str(report.RESULTS / given.scale / "runs" / name)}
        )
    return runs


def finished(fields: dict) -> bool:
    """Whether a run has come to its end. Raises ValueError where its folder holds one with other flags."""
    run = Path(fields["run"])
    if not (run / "config.json").exists():
        return False
    saved = json.loads((run / "config.json").read_text())
    for name, value in fields.items():
        if name != "run" and value not in (None, saved.get(name)):
            flag_name = "--" + name.replace("_", "-")
            raise ValueError(f"{run} has {flag_name} {saved.get(name)}, not {value}: move it away to train it again")
    return report.ended(run)


def train(fields: dict):
    """Train a run, or go on with it, just as `python train_cifar.py FLAGS` would; it notes that as its command."""
    own, handlers = sys.argv, {number: getsignal(number) for number in (SIGINT, SIGTERM)}
    resume = {"resume": True} if (Path(fields["run"]) / "last.pt").exists() else {}
    try:
        sys.argv = ["train_cifar.py", *as_flags(fields | resume)]
        train_cifar.main()
    finally:
        sys.argv = own
        for number, handler in handlers.items():  # a run's own only take note, for the end of a step
            signal(number, handler)
        torch.compiler.reset()  # or torch.compile would give up on the ninth model


def train_all(title: str, runs: list[dict]):
    """Train what is not finished yet. Ends the process, naming the run, where one is not trained to its end."""
    waiting = [fields for fields in runs if not finished(fields)]
    if waiting and not waiting[0]["dataset"]:
        guess_dataset(waiting[0]["data_dir"], Config.data_dir)  # raises, before anything is begun, where there is none
    print(f"{title}: {len(waiting)} runs to do, {len(runs) - len(waiting)} finished before", flush=True)
    began = time.monotonic()
    for number, fields in enumerate(waiting, 1):
        name, place = Path(fields["run"]).name, f"[{number}/{len(waiting)}]"
        print(f"\n{place} {name}", flush=True)
        try:
            train(fields)
        except (SystemExit, KeyboardInterrupt, torch.OutOfMemoryError) as problem:
            why = "" if isinstance(problem, SystemExit) else f" ({type(problem).__name__})"  # else it has said why
            raise SystemExit(f"reproduce.py: the run {name} was not finished{why}; {report.KEPT}") from problem
        passed = (time.monotonic() - began) / 60
        left = passed / number * (len(waiting) - number)
        accuracy = read_metrics(Path(fields["run"]))[-1]["test_accuracy"]
        print(f"{place} {name}: {accuracy:.1f}% after {passed:.1f} minutes; about {left:.0f} minutes left", flush=True)


def complete(names: list[str], rate: float | None, given: argparse.Namespace) -> dict[str, dict]:
    """Train all runs of these grids and write their results; return the cells of every grid."""
    all_grids = grids(SCALES[given.scale])
    wanted = {
        name: {place: runs_of(change, rate, given) for place, change in all_grids[name].items()} for name in names
    }
    once = {fields["run"]: fields for grid in wanted.values() for seeds in grid.values() for fields in seeds}
    train_all(f"{', '.join(names)} ({given.scale})", list(once.values()))
    cells = {}
    for name, grid in wanted.items():
        folders = {place: [Path(fields["run"]) for fields in seeds] for place, seeds in grid.items()}
        cells[name] = report.write_grid(given.scale, name, folders)
    return cells


def train_grids(names: list[str], given: argparse.Namespace):
    """Complete grids; where no learning rate is given, first choose the one that is best for both models together."""
    rate = given.lr
    if rate is None:
        cells = complete(["learning-rate"], None, given)["learning-rate"]
        scores = {
            rate: cells[f"{rate:g}", "ConViT"]["mean"] + cells[f"{rate:g}", "plain ViT"]["mean"] for rate in RATES
        }
        rate = max(RATES, key=scores.get)
        print(f"the learning rate is {rate:g}\n")
    complete(names, rate, given)


def test_pictures(model: ConViT, given: argparse.Namespace) -> Pictures:
    """The test set of --data-dir in the size that the model takes. Raises ValueError where the classes are others."""
    dataset = given.dataset or guess_dataset(given.data_dir, Config.data_dir)
    size, device = model.config.img_size, torch.device(Config.device)
    test_set = load_pictures(dataset, given.data_dir, size, device, Config.workers)[1]
    there, known = len(test_set.classes), model.config.num_classes
    if there != known:
        raise ValueError(f"{given.data_dir} has {there} classes, but {given.run} was trained on {known}")
    return test_set


@torch.no_grad()
def show_gates(given: argparse.Namespace):
    """Gates and non-locality over a run, and what every head attends to from the middle patch, before and after."""
    files = snapshots(given.run)
    opened = [open_snapshot(file) for file in (files[0], files[-1])]
    config = opened[-1][0].config
    layers, (rows, columns) = config.gpsa_layers, config.grid
    if layers == 0:
        raise ValueError(f"{given.run} is a plain ViT: it has no gates to show")
    pictures = test_pictures(opened[-1][0], given).images.cpu()
    some = normalise(pictures[:: max(len(pictures) // 64, 1)])
    middle, maps = rows // 2 * columns + columns // 2, {}
    for model, record in opened:
        attention = model(some, return_attention=True)[1][:layers]
        from_middle = torch.stack([layer.mixed[:, :, middle].mean(0) for layer in attention])
        maps[f"after epoch {record['epoch']}"] = gates(model)[:layers], from_middle.unflatten(2, (rows, columns))
    report.write_gates(given.run.name, read_metrics(given.run), config.grid, maps, pictures.device)


def masked(model: ConViT, embedding: bool = False, content: int = 0, position: int = 0) -> ConViT:
    """A copy of a model without its position embedding, or without content or position in that many first layers."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        if embedding:
            model.pos_embed.zero_()
        for block in model.blocks[:content]:
            block.attn.gating_param.fill_(math.inf)  # a gate of exactly 1: all position
        for block in model.blocks[:position]:
            block.attn.gating_param.fill_(-math.inf)
    return model


def show_masking(given: argparse.Namespace):
    """Test accuracy of a run's last model, whole and with parts of it masked."""
    model, record = open_snapshot(snapshots(given.run)[-1])
    test_set = test_pictures(model, given)
    device = test_set.images.device

    def accuracy(**parts) -> float:
        print(".", end="", flush=True)
        return evaluate(masked(model, **parts).to(device), test_batches(test_set, 256), device, "off")["test_accuracy"]

    whole, without_embedding = accuracy(), accuracy(embedding=True)
    counts = range(1, model.config.gpsa_layers + 1)
    curves = {part: [whole, *(accuracy(**{part: count}) for count in counts)] for part in ("content", "position")}
    report.write_masking(f"{given.run.name}, epoch {record['epoch']}", without_embedding, curves, device)


COMMANDS = {
    "sample-efficiency": "ConViT and a plain ViT on a twentieth to all of the pictures (Table 2)",
    "ablation": "parts of ConViT taken away, on all pictures and on a tenth (Table 3)",
    "locality": "number of GPSA layers and strength of their init, on a tenth of the pictures (Fig. 8)",
    "all": "the three above",
    "gates": "gates, non-locality and maps of a run's heads (Figs. 5 to 7)",
    "masking": "accuracy of a run with parts masked (Tables 5 and 6)",
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.add_argument("--data-dir", default=Config.data_dir, help="as that of train_cifar.py (%(default)s)")
        command.add_argument("--dataset", choices=DATASETS, help="by default a folder where --data-dir is one")
        if name in ("gates", "masking"):
            command.add_argument("--run", type=Path, default=DEMO, help="a run folder of train_cifar.py (demo/)")
        else:
            command.add_argument("--scale", choices=SCALES, default="laptop", help="size of the runs (%(default)s)")
            command.add_argument("--seeds", type=at_least(1), help="seeds of every run; by default the scale's")
            command.add_argument("--lr", type=float, help="learning rate; by default the best on held-back pictures")
            command.add_argument("--amp", choices=AMP_DTYPES, help="mixed precision; by default the scale's")
    given = parser.parse_args()
    try:
        if given.command == "gates":
            show_gates(given)
        elif given.command == "masking":
            show_masking(given)
        else:
            train_grids(list(COMMANDS)[:3] if given.command == "all" else [given.command], given)
    except (OSError, ValueError) as problem:
        sys.exit(f"reproduce.py: {problem}")
    except KeyboardInterrupt:
        sys.exit("\nreproduce.py: stopped")


if __name__ == "__main__":
    main()
