"""Command-line flags from a dataclass: a field is a flag, its metadata the help."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TypeVar

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


def parse_flags(config_class: type[Config], description: str, argv: list[str] | None = None) -> Config:
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
            options.setdefault("type", field.type)
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **options)

    given = parser.parse_args(argv)
    file = given.config
    if getattr(given, "resume", False):
        file = file or Path(given.run) / "config.json"
    if file:
        parser.set_defaults(**_read_config(parser, config_class, file))
        given = parser.parse_args(argv)
    values = vars(given)
    del values["config"]
    return config_class(**values)


def _read_config(parser: argparse.ArgumentParser, config_class: type, file: str | Path) -> dict:
    try:
        values = json.loads(Path(file).read_text())
    except OSError as error:
        parser.error(f"there is no run to go on with or repeat: {file} cannot be opened ({error.strerror})")
    except ValueError:
        parser.error(f"{file} is not a config.json")
    names = {field.name for field in dataclasses.fields(config_class)} - {"resume", "run"}
    if not isinstance(values, dict) or not values.keys() <= names | {"resume", "run"}:
        parser.error(f"{file} is not a config.json of this script")
    return {name: value for name, value in values.items() if name in names}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it stands, and every flag with its default."""
