"""Flags of the training scripts, generated from a dataclass, and the model that they describe."""

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar, get_args

import torch

from convit_min import MODELS, ConViT, ConViTConfig, create_model
from training.distributed import UsageError, UserError, print0, world_size
from weights import list_names, load_weights

ConfigType = TypeVar("ConfigType")

cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CORES = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # available to each process of this machine

# flags that may change on --resume
CHANGEABLE_ON_RESUME = {"data_dir", "run", "resume", "eval", "weights", "device", "compile", "workers", "save_every"}
CHANGEABLE_ON_RESUME |= {"tensorboard", "skip_bad_images", "csv", "epochs", "lr", "grad_accum_steps"}
RENAMED_FLAGS = {  # old name in a run folder -> new name
    "shift": "crop_padding",
    "flip": "hflip",
    "hold_out": "val_fraction",
    "accumulate": "grad_accum_steps",
    "plain_epochs": "mixup_off_epochs",
    "repeats": "aug_repeats",
    "epoch_steps": "steps_per_epoch",
}


def flag(default, text: str, **options):
    """A dataclass field that is also a command-line flag; `options` go to argparse's add_argument."""
    return dataclasses.field(default=default, metadata={"help": text, **options})


def int_at_least(minimum: int):
    """An argparse type: an integer of at least `minimum`."""

    def integer(text: str) -> int:
        if not text.isdigit() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least {minimum}")
        return int(text)

    return integer


def float_between(minimum: float, maximum: float = math.inf):
    """An argparse type: a number from `minimum` to `maximum`."""

    def in_range(text: str) -> float:
        if not minimum <= float(text) <= maximum:
            limit = "" if maximum == math.inf else f" and at most {maximum:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be at least {minimum:g}{limit}")
        return float(text)

    in_range.__name__ = "float"  # for the message about text that is no number
    return in_range


def fraction(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0 and at most 1")
    return float(text)


def interval(text: str) -> str:
    """An argparse type: a number of steps, or of minutes as in 10m."""
    if not re.fullmatch(r"[1-9]\d*m?", text):
        raise ValueError(text)
    return text


@dataclass
class RunConfig:
    """Flags of both scripts; each script adds its datasets and its recipe.

    In Python, too, values are checked, and converted, as on the command line. Raises UsageError for invalid ones.
    """

    # data
    data_fraction: float = flag(1.0, "fraction of every class to train on, drawn with --seed", type=fraction)
    scale_epochs: bool = flag(False, "multiply the epochs by 1 / --data-fraction: as many steps as on all data")
    val_fraction: float | None = flag(
        None, "hold out this fraction of the training set, and evaluate on it instead of the test set", type=fraction
    )
    skip_bad_images: bool = flag(False, "leave out unreadable images, with a note")
    # model
    model: str = flag("convit_tiny", "a name in convit_min.MODELS", choices=MODELS, metavar="NAME")
    weights: str | None = flag(
        None, "initialize from a run, file, or released model; for other classes, the classifier starts untrained"
    )
    img_size: int | None = flag(None, "image size in pixels (default: the model's)", type=int_at_least(1))
    patch_size: int | None = flag(None, "patch size in pixels (default: the model's)", type=int_at_least(1))
    gpsa_layers: int | None = flag(None, "number of GPSA blocks (default: the model's)", type=int_at_least(0))
    locality_strength: float = flag(1.0, "alpha of the convolutional initialization", type=float_between(0))
    conv_init: bool = flag(True, "initialize GPSA as a convolution")
    gating: str = flag("learned", "frozen keeps the gates at --gate-init", choices=["learned", "frozen"])
    gate_init: float = flag(1.0, "initial gates, as logits: 1 gives 0.73, 0 gives 0.5")
    freeze_gpsa: bool = flag(False, "freeze the attention of GPSA: qk, v, positions, and gates")
    pool: str = flag("token", "classify from the class token or the mean of patch tokens", choices=["token", "mean"])
    drop_path: float = flag(0.0, "stochastic depth rate of the last block", type=float_between(0, 1))
    # optimization
    epochs: int = flag(300, "number of epochs", type=int_at_least(1))
    steps_per_epoch: int | None = flag(
        None, "optimizer steps per epoch (default: one pass over the training set)", type=int_at_least(1)
    )
    batch_size: int = flag(512, "global batch size, over all processes", type=int_at_least(1))
    grad_accum_steps: int = flag(1, "gradient accumulation: micro-batches per step", type=int_at_least(1))
    warmup_epochs: float = flag(5.0, "epochs of linear warm-up", type=float_between(0))
    clip_grad: float = flag(0.0, "max gradient norm (0: off)", type=float_between(0))
    hflip: bool = flag(True, "random horizontal flip; turn it off for digits or letters")
    mixup_off_epochs: int = flag(0, "final epochs without mixup and cutmix", type=int_at_least(0))
    # execution
    seed: int = flag(0, "random seed of the weights, the data order, and augmentation")
    amp: str = flag(
        "off", "mixed precision; without a value: bf16", nargs="?", const="bf16", choices=["off", "bf16", "fp16"]
    )
    compile: bool = flag(False, "torch.compile the model")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")
    # run folder
    run: str = flag("runs/run", "run folder to write")
    tensorboard: bool = flag(False, "also write TensorBoard events")
    save_every: str | None = flag(None, "also save every N steps, or N minutes as in 10m", type=interval)
    resume: bool = flag(False, "resume from last.pt in --run")
    eval: bool = flag(False, "only evaluate --weights, or best.pt of --run; writes eval.json into --run")
    csv: bool = flag(False, "with --eval, also write eval.csv, one row per image")

    def __post_init__(self):
        vars(self).update(vars(_flag_parser(type(self)).parse_args(as_flags(vars(self)))))
        if self.eval and not self.weights:
            self.weights = f"{self.run}/best.pt"

    @property
    def device_batch_size(self) -> int:
        """Images per forward pass of one process."""
        return self.batch_size // (world_size() * self.grad_accum_steps)

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, after --scale-epochs."""
        return round(self.epochs / self.data_fraction) if self.scale_epochs else self.epochs

    def epoch_length(self, num_train: int) -> int:
        """Training images per epoch."""
        return self.steps_per_epoch * self.batch_size if self.steps_per_epoch else num_train

    def check(self, num_train: int):
        """Raise UserError for a batch size that cannot be split, or a package or precision that is not available."""
        num_splits = world_size() * self.grad_accum_steps
        if self.csv and not self.eval:
            raise UserError("--csv needs --eval")
        if self.tensorboard and not find_spec("tensorboard"):
            raise UserError("--tensorboard needs a package: pip install tensorboard")
        if self.amp == "bf16" and self.device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError("this GPU does not support bf16: use --amp fp16")
        if self.batch_size % num_splits:
            raise UserError(
                f"--batch-size {self.batch_size} must be a multiple of processes x --grad-accum-steps = {num_splits}"
            )
        if num_train < self.batch_size and not self.eval:
            raise UserError(f"--batch-size {self.batch_size} exceeds the {num_train} training images: lower it")
        if self.steps_per_epoch and self.scale_epochs:
            raise UserError("--steps-per-epoch and --scale-epochs both set the length of a run: leave one of them out")
        if self.warmup_epochs >= self.total_epochs and not self.eval:
            print0(f"note: --warmup-epochs {self.warmup_epochs:g} covers the whole run")

    def check_same_run(self, saved: dict):
        """Raise UserError if a flag differs from the saved run and may not change on --resume."""
        for name, value in vars(self).items():
            if name not in CHANGEABLE_ON_RESUME and value != saved.get(name):
                flag_name = "--" + name.replace("_", "-")
                raise UserError(
                    f"the run has {flag_name} {saved.get(name)}, not {value}: omit the flag, or choose another --run"
                )


def build_model(config: RunConfig, classes: list[str]) -> ConViT:
    """The model that the flags describe, with --weights loaded. Raises UserError if it cannot work."""
    fields = {field.name for field in dataclasses.fields(ConViTConfig)} & vars(config).keys()
    overrides = {name: getattr(config, name) for name in fields if getattr(config, name) is not None}
    try:
        model = create_model(config.model, num_classes=len(classes), **overrides)
        if config.weights and not config.resume:
            with warnings.catch_warnings(record=True) as caught:
                load_weights(model, config.weights, classes=classes)
            for warning in caught:
                print0(f"note: {warning.message}")
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    if config.freeze_gpsa:
        freeze_gpsa(model)
    return model


def freeze_gpsa(model: ConViT):
    """Freeze the attention of all GPSA blocks (qk, v, positions, gates), but not proj: "frozen" in Table 3."""
    for index in model.config.gpsa_blocks:
        model.blocks[index].attn.requires_grad_(False)
        model.blocks[index].attn.proj.requires_grad_(True)


def parse_flags(config_class: type[ConfigType], description: str) -> ConfigType:
    """Parse the command line. --config FILE, and --resume with the run's config.json, replace the defaults.

    Raises UsageError for an unknown flag, an invalid value, or a config file that does not match.
    """
    parser = _flag_parser(config_class, description)
    parser.add_argument("--config", metavar="FILE", help="repeat a run from its config.json; other flags override it")
    args = parser.parse_args()
    use_saved_config = args.resume or (args.eval and not args.weights)
    file = args.config or (Path(args.run) / "config.json" if use_saved_config else None)
    if file:
        saved_flags = _read_flags(config_class, file, exclude_weights=args.eval)
        args = parser.parse_args([*saved_flags, *sys.argv[1:]])  # validated like typed ones
    values = vars(args)
    del values["config"]
    return config_class(**values)


def _flag_parser(config_class: type, description: str = "") -> argparse.ArgumentParser:
    """A parser with a flag per field."""
    parser = _Parser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    for field in dataclasses.fields(config_class):
        options = dict(field.metadata)
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.setdefault("type", (get_args(field.type) or [field.type])[0])  # str of "str | None"
        parser.add_argument("--" + field.name.replace("_", "-"), default=field.default, **options)
    return parser


def as_flags(values: dict) -> list[str]:
    """Config values as command-line flags; None, which stands for a default, is left out."""
    flags = []
    for name, value in values.items():
        flag_name = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag_name}" if value else f"--no-{flag_name}")
        elif value is not None:
            flags.append(f"--{flag_name}={value}")
    return flags


def _read_flags(config_class: type, file: str | Path, exclude_weights: bool) -> list[str]:
    """The flags in a config.json, except those of one invocation (--run, --resume, --eval) or of a machine.

    To evaluate a run, exclude also the weights that it started from.
    """
    try:
        values = json.loads(Path(file).read_text())
    except OSError as error:
        message = f"no run to resume, repeat, or evaluate: {file} cannot be opened ({error.strerror})"
        raise UsageError(message) from error
    except ValueError:
        values = None
    names = {field.name for field in dataclasses.fields(config_class)}
    if isinstance(values, dict) and (old := values.keys() & RENAMED_FLAGS.keys() - names):
        renamed = ", ".join(
            f"--{name} is now --{RENAMED_FLAGS[name]}".replace("_", "-") for name in RENAMED_FLAGS if name in old
        )
        raise UsageError(
            f"{file} was written by an older version ({renamed}): start a new run with the new flags, for example from "
            "its best.pt with --weights"
        )
    if not isinstance(values, dict) or not values.keys() & names:
        raise UsageError(f"{file} is not a config.json of this script")
    if unknown := values.keys() - names:
        nearest = _nearest(unknown, names)
        raise UsageError(f"{file} has unknown keys: {list_names(unknown)}; did you mean {nearest}, or is it a run of "
                         "the other training script?")  # fmt: skip
    excluded = ("run", "resume", "eval", "device", "workers", *(["weights"] if exclude_weights else []))
    return as_flags({name: value for name, value in values.items() if name not in excluded})


def _nearest(unknown: Iterable[str], known: Iterable[str]) -> str:
    """The known name that is most similar to any of the unknown ones."""
    names = list(known)
    return max(names, key=lambda name: max(difflib.SequenceMatcher(None, name, other).ratio() for other in unknown))


class _Parser(argparse.ArgumentParser):
    """Raises UsageError instead of exiting, and suggests the nearest flag."""

    def error(self, message: str):
        if unknown := re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []:
            message += f"; did you mean {_nearest(unknown, self._option_string_actions)}?"
        raise UsageError(message) from None


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description as written, and shows the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)
