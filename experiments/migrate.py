"""Convert runs of earlier versions, whose flags and metrics had different names, to one runs.jsonl.

    python -m experiments.migrate SOURCE ... --into FILE

A source is a run folder or a runs.jsonl; runs that FILE already has are skipped.
"""

import argparse
import re
from pathlib import Path

from experiments.sweep import Sweep, read_run
from training.config import RENAMED_FLAGS

OLD_FLAGS = "|".join(name.replace("_", "-") for name in RENAMED_FLAGS)


def rename_flags(text: str) -> str:
    """Rename the flags of a command (--hold-out 0.1, --no-flip) and of a run's name (..._hold-out=0.1_...)."""

    def rename(match: re.Match) -> str:
        return match[1] + RENAMED_FLAGS[match[2].replace("-", "_")].replace("_", "-")

    text = re.sub(rf"(--(?:no-)?)({OLD_FLAGS})(?=[\s=]|$)", rename, text)
    return re.sub(rf"(_)({OLD_FLAGS})(?==)", rename, text)


def migrate(record: dict) -> dict:
    """A record with current names; unchanged if already current."""
    config = {RENAMED_FLAGS.get(name, name): value for name, value in record["config"].items()}
    config.pop("colour_jitter", None)
    config.setdefault("pool", "token")
    config["run"] = rename_flags(config["run"])
    provenance = [entry | {"command": rename_flags(entry["command"])} for entry in record["provenance"]]
    metrics = [
        row | {"heads": {"center" if name == "centre" else name: value for name, value in row["heads"].items()}}
        for row in record["metrics"]
    ]
    changes = {"name": rename_flags(record["name"]), "config": config, "provenance": provenance, "metrics": metrics}
    return record | changes


def read_old_runs(source: Path) -> list[dict]:
    """The migrated records of a run folder, or of all runs of a runs.jsonl."""
    if source.suffix == ".jsonl":
        return [migrate(record) for record in Sweep(source, source.parent).records().values()]
    record, exercise = migrate(read_run(source)), source / "exercise.txt"
    return [record | ({"definition": rename_flags(exercise.read_text())} if exercise.exists() else {})]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", metavar="SOURCE")
    parser.add_argument("--into", type=Path, required=True, metavar="FILE", help="runs.jsonl to append to")
    args = parser.parse_args()
    for source in args.sources:
        for record in read_old_runs(source):
            Sweep(args.into, args.into.parent).append(record)


if __name__ == "__main__":
    main()
