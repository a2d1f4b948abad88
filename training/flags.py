"""Command-line flags from a dataclass: a field is a flag, its metadata the help."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TypeVar, get_args

Config = TypeVar("Config")


def flag(default, text: str, **options):
    """A dataclass field that is also a flag; `options` go to argparse's add_argument."""
    return dataclasses.field(default=default, metadata={"help": text, **options})


def at_least(smallest: int):
    """An argparse type: a whole number from `smallest` on."""

    def whole_number(text: str) -> int:
        if not text.isdigit() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {smallest} on")
        return int(text)

    return whole_number


def fraction(text: str) -> float:
    """An argparse type: a number above 0, and at most 1."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return float(text)


def parse_flags(config_class: type[Config], description: str) -> Config:
    """Read the flags of a script. --config FILE, and --resume with the run's own config.json, replace the defaults.

    Exits with one line, as argparse does, for an unknown flag, a bad value, or a config file that does not fit.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="repeat a run: its config.json; other flags change it")
    for field in dataclasses.fields(config_class):
        options = dict(field.metadata)
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.setdefault("type", (get_args(field.type) or [field.type])[0])  # str of "str | None"
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **options)

    given = parser.parse_args()
    known = given.resume or (given.eval and not given.weights)  # the run in --run, so its flags
    file = given.config or (Path(given.run) / "config.json" if known else None)
    if file:
        given = parser.parse_args([*_flags_of(parser, config_class, file), *sys.argv[1:]])  # checked like typed ones
    values = vars(given)
    del values["config"]
    return config_class(**values)


def as_flags(values: dict) -> list[str]:
    """Fields of a config as one would type them; None, which stands for a default, is left out."""
    flags = []
    for name, value in values.items():
        flag_name = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag_name}" if value else f"--no-{flag_name}")
        elif value is not None:
            flags.append(f"--{flag_name}={value}")
    return flags


def _flags_of(parser: argparse.ArgumentParser, config_class: type, file: str | Path) -> list[str]:
    """The flags that a config.json stands for, but for those of a call (--run, --resume, --eval) or of a machine."""
    try:
        values = json.loads(Path(file).read_text())
    except OSError as error:
        parser.error(f"there is no run to go on with, repeat or evaluate: {file} cannot be opened ({error.strerror})")
    except ValueError:
        values = None
    if not isinstance(values, dict) or not values.keys() <= {field.name for field in dataclasses.fields(config_class)}:
        parser.error(f"{file} is not a config.json of this script")
    not_kept = ("run", "resume", "eval", "device", "workers")
    return as_flags({name: value for name, value in values.items() if name not in not_kept})


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it stands, and every flag with its default."""
