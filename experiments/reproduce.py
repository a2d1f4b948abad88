"""Compare ConViT with a plain ViT, as the paper does, and look into the heads of a single run.

    python -m experiments.reproduce grid            train the grid: about 75 hours of one CPU core
    python -m experiments.reproduce report          write tables, tests, and figures of our grid, or of --out runs/grid
    python -m experiments.reproduce gates           draw Figs. 5 to 7 for demo/cifar10, or for a different --run
    python -m experiments.reproduce masking         repeat Tables 5 and 6 for such a run
    python -m experiments.reproduce compare DIR     write a table and a plot of the runs in DIR/runs.jsonl

Only the first trains. Rerun it to resume it; several processes can share the grid: one per CPU core, or many on a GPU
(docs/results.md).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from experiments import grid, heads, report
from experiments.sweep import CODE, run_main
from train_cifar import Config
from training.data import DATASETS


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(name: str, function: Callable, text: str, out: str) -> argparse.ArgumentParser:
        """A command that calls a function with its flags."""
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(function=function)
        command.add_argument("--out", type=Path, default=Path(out), help="folder to write (%(default)s)")
        return command

    command = add_command("grid", grid.train, "train the missing runs of the grid", "runs/grid")
    command.add_argument("--data-dir", default=Config.data_dir, help="see train_cifar.py (%(default)s)")
    command.add_argument("--compile", action="store_true", help="torch.compile all models, for a GPU")
    command.add_argument("--list", action="store_true", dest="list_only", help="print the state and flags of all runs")

    add_command("report", report.write_grid, "tables, tests, and figures of the grid", "results/evidence")

    for name, function, text in (
        ("gates", heads.write_gates, "gates, non-locality, and attention maps of a run (Figs. 5 to 7)"),
        ("masking", heads.write_masking, "accuracy of a run with parts masked (Tables 5 and 6)"),
    ):
        command = add_command(name, function, text, "results/reproduce")
        command.add_argument("--run", type=Path, default=CODE / "demo/cifar10", help="run folder (demo/cifar10)")
        command.add_argument("--data-dir", default=Config.data_dir, help="see train_cifar.py (%(default)s)")
        command.add_argument("--dataset", choices=DATASETS, help="default: inferred from --data-dir")

    command = commands.add_parser("compare", help="table and plot of any runs")
    command.set_defaults(function=report.compare)
    command.add_argument("folder", type=Path, help="has runs.jsonl; gets README.md and compare.png")
    command.add_argument("runs", type=Path, nargs="*", help="run folders to include")

    flags = vars(parser.parse_args())
    run_main(flags.pop("function"), **flags)


if __name__ == "__main__":
    main()
