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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import torch

from convit_min import MODELS, ConViT, ConViTConfig, create_model
from training.distributed import UserError, abort, print0, world_size
from training.folders import has_images
from weights import load_weights

machine_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CORES = max(1, machine_cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # available to each process

# flags that may change on --resume
CHANGEABLE_ON_RESUME = {"data_dir", "run", "resume", "eval", "weights", "device", "compile", "workers", "save_every"}
CHANGEABLE_ON_RESUME |= {"tensorboard", "skip_bad_images", "csv", "epochs", "lr", "grad_accum_steps", "amp"}


def flag(default, text: str, **options):
    """A dataclass field that is also a command-line flag; a number may have a `minimum` and a `maximum`.

    Other options go to argparse's add_argument.
    """
    return dataclasses.field(default=default, metadata={"help": text, **options})


def number(kind: type, minimum: float, maximum: float = math.inf):
    """An argparse type: an int or a float, from `minimum` to `maximum`."""

    def parse(text: str) -> float:
        value = kind(text)
        if not minimum <= value <= maximum:
            limit = "" if maximum == math.inf else f" and at most {maximum:g}"
            raise argparse.ArgumentTypeError(f"{text!r} must be at least {minimum:g}{limit}")
        return value

    parse.__name__ = kind.__name__  # for the message about text that is not a number
    return parse


def interval(text: str) -> str:
    """An argparse type: a number of steps, or of minutes as in 10m."""
    if not re.fullmatch(r"[1-9]\d*m?", text):
        raise ValueError(text)
    return text


@dataclass
class RunConfig:
    """Flags of both scripts. Each script adds its own, and sets defaults, as in `epochs: int = 30`.

    Values set in Python are checked and converted as on the command line. Raises UserError for invalid ones.
    """

    # data
    workers: int = flag(CORES, "image-decoding workers per training process (train_cifar.py: threads)", minimum=0)
    data_fraction: float = flag(1.0, "fraction of every class to train on, drawn with --seed", minimum=1e-6, maximum=1)
    scale_epochs: bool = flag(False, "multiply the epochs by 1 / --data-fraction: as many steps as on all data")
    val_fraction: float | None = flag(
        None, "hold out this fraction of the training set for evaluation", minimum=1e-6, maximum=1
    )
    skip_bad_images: bool = flag(False, "leave out unreadable images, with a note")
    # model
    model: str = flag(None, "a name in convit_min.MODELS", choices=MODELS, metavar="NAME")
    weights: str | None = flag(None, "initialize from a run, file, or released model; new classifier if classes differ")
    img_size: int | None = flag(None, "image size in pixels (default: the model's)", minimum=1)
    patch_size: int | None = flag(None, "patch size in pixels (default: the model's)", minimum=1)
    gpsa_layers: int | None = flag(None, "number of GPSA blocks (default: the model's)", minimum=0)
    locality_strength: float = flag(1.0, "alpha of the convolutional initialization", minimum=0)
    conv_init: bool = flag(True, "initialize GPSA as a convolution")
    gating: str = flag("learned", "frozen: keep --gate-init, or the gates of --weights", choices=["learned", "frozen"])
    gate_init: float = flag(1.0, "initial gates, as logits: 1 gives 0.73, 0 gives 0.5")
    freeze_gpsa: bool = flag(False, "freeze the attention of GPSA: qk, v, positions, and gates")
    pool: str = flag("token", "classify from the class token or the mean of patch tokens", choices=["token", "mean"])
    drop_path: float = flag(0.0, "stochastic depth rate of the last block", minimum=0, maximum=1)
    # optimization
    epochs: int = flag(None, "number of epochs", minimum=1)
    steps_per_epoch: int | None = flag(None, "optimizer steps per epoch (default: one pass over the images)", minimum=1)
    batch_size: int = flag(None, "global batch size, over all processes", minimum=1)
    grad_accum_steps: int = flag(1, "gradient accumulation: micro-batches per step", minimum=1)
    lr: float = flag(None, "peak learning rate", minimum=0)
    gate_lr_scale: float = flag(None, "learning-rate multiplier for the gates; above 1 for short runs", minimum=0)
    warmup_epochs: float = flag(None, "epochs of linear warm-up", minimum=0)
    weight_decay: float = flag(None, "AdamW weight decay, matrices only", minimum=0)
    clip_grad: float = flag(0.0, "max gradient norm (0: off)", minimum=0)
    ema_decay: float = flag(None, "decay of the moving average of the weights (0: off)", minimum=0, maximum=1)
    # augmentation
    hflip: bool = flag(True, "random horizontal flip; turn it off for digits or letters")
    label_smoothing: float = flag(None, "label smoothing", minimum=0, maximum=1)
    mixup: float = flag(None, "mixup alpha (0: off)", minimum=0)
    cutmix: float = flag(None, "cutmix alpha (0: off)", minimum=0)
    mixup_off_epochs: int = flag(0, "final epochs without mixup and cutmix", minimum=0)
    random_erasing: float = flag(None, "probability of random erasing", minimum=0, maximum=1)
    # execution
    seed: int = flag(0, "random seed of the weights, the data order, and augmentation")
    amp: str = flag("off", "mixed precision (alone: bf16)", nargs="?", const="bf16", choices=["off", "bf16", "fp16"])
    compile: bool = flag(False, "torch.compile the model")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")
    # run folder
    run: str = flag(None, "run folder to write; with several machines, on a shared disk")
    tensorboard: bool = flag(False, "also write TensorBoard events")
    save_every: str | None = flag(None, "also save every N steps, or N minutes as in 10m", type=interval)
    resume: bool = flag(False, "resume from last.pt in --run")
    eval: bool = flag(False, "only evaluate --weights, or best.pt of --run (not --model); writes eval.json into --run")
    csv: bool = flag(False, "with --eval, also write eval.csv, one row per image")

    def __post_init__(self):
        vars(self).update(vars(_flag_parser(type(self)).parse_args(as_flags(vars(self)))))
        if self.eval and not self.weights:
            self.weights = f"{self.run}/best.pt"

    @property
    def device_batch_size(self) -> int:
        """Images per forward pass of one process."""
        return max(1, self.batch_size // (world_size() * self.grad_accum_steps))

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run, after --scale-epochs."""
        return round(self.epochs / self.data_fraction) if self.scale_epochs else self.epochs

    def epoch_length(self, num_train: int) -> int:
        """Training images per epoch."""
        return self.steps_per_epoch * self.batch_size if self.steps_per_epoch else num_train

    def check(self, num_train: int):
        """Raise UserError for training flags that contradict each other, the data, or the machine."""
        if self.eval:  # in Python; the scripts do not train then
            raise UserError("train() does not evaluate: call training.evaluation.evaluate_weights, as main() does")
        if self.csv:
            raise UserError("--csv needs --eval")
        if self.tensorboard and not find_spec("tensorboard"):
            raise UserError("--tensorboard needs a package: pip install tensorboard")
        if self.amp == "bf16" and self.device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError("this GPU does not support bf16: use --amp fp16")
        if self.batch_size % (splits := world_size() * self.grad_accum_steps):
            multiple = f"a multiple of processes x --grad-accum-steps = {splits}"
            raise UserError(f"--batch-size {self.batch_size} must be {multiple}")
        if num_train < self.batch_size:
            raise UserError(f"--batch-size {self.batch_size} exceeds the {num_train} training images: lower it")
        if self.steps_per_epoch and self.scale_epochs:
            raise UserError("--steps-per-epoch and --scale-epochs both set the length of a run: leave one of them out")
        if self.warmup_epochs >= self.total_epochs:
            print0(f"note: --warmup-epochs {self.warmup_epochs:g} covers the whole run")

    def check_same_run(self, saved: dict):
        """Raise UserError if a flag differs from the saved run and may not change on --resume."""
        for name, value in vars(self).items():
            old = saved.get(name, getattr(type(self), name))  # of a flag that is newer than the run: its default
            if name not in CHANGEABLE_ON_RESUME and value != old:
                difference = f"--{name.replace('_', '-')} {old}, not {value}"
                raise UserError(f"the run has {difference}: omit the flag, or choose another --run")


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


def parse_flags(config_class: type[RunConfig], description: str) -> RunConfig:
    """Parse the command line. Defaults come from --config FILE, or with --resume or --eval from the run's config.json.

    Raises UserError for an unknown flag, an invalid value, or a config file that does not match.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are not UTF-8
    parser = _flag_parser(config_class, description)
    parser.add_argument("--config", metavar="FILE", help="repeat a run from its config.json; other flags override it")
    args = parser.parse_args()
    use_saved_config = args.resume or (args.eval and not args.weights)
    file = args.config or (Path(args.run) / "config.json" if use_saved_config else None)
    if file:
        values = _read_config(file)
        excluded = ["run", "resume", "eval", "device", "workers"]  # flags of one command or machine
        if args.eval:
            excluded += ["weights"]  # those that the run started from
            own = values.get("data_dir") or config_class.data_dir
            data_dir = parser.parse_args([f"--data-dir={own}", *sys.argv[1:]]).data_dir
            if os.path.realpath(data_dir) != os.path.realpath(own) and has_images(Path(data_dir)):
                excluded += ["dataset", "val_fraction"]  # of the run's own images
                if values.get("val_fraction"):
                    print0(f"note: {data_dir} is not the run's {own}, so that its --val-fraction does not apply")
        saved = as_flags({name: value for name, value in values.items() if name not in excluded})
        try:
            args = parser.parse_args([*saved, *sys.argv[1:]])  # the last value of a flag counts
        except UserError as error:
            reason = "use the script that wrote it; if that was an older version, start a new run"
            raise UserError(f"{file} does not fit this script ({error}); {reason}") from None
    values = vars(args)
    del values["config"]
    return config_class(**values)


def _flag_parser(config_class: type[RunConfig], description: str = "") -> argparse.ArgumentParser:
    """A parser with a flag per field."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    inherited = {field.name: field.metadata for field in dataclasses.fields(RunConfig)}
    for field in dataclasses.fields(config_class):
        options = dict(field.metadata or inherited[field.name])
        options["help"] += "" if field.default is None else " (default: %(default)s)"
        kind = (get_args(field.type) or [field.type])[0]  # str of "str | None"
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif "minimum" in options:
            options["type"] = number(kind, options.pop("minimum"), options.pop("maximum", math.inf))
        else:
            options.setdefault("type", kind)
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


def _read_config(file: str | Path) -> dict:
    """The content of a config.json. Raises UserError if it is missing, or not one."""
    try:
        return dict(json.loads(Path(file).read_text()))
    except OSError as error:
        raise UserError(f"no run to resume, repeat, or evaluate: {file} cannot be opened ({error.strerror})") from error
    except (ValueError, TypeError) as error:  # not JSON, or not a dictionary
        raise UserError(f"{file} is not a config.json of this script") from error


class Parser(argparse.ArgumentParser):
    """`parse_args` raises UserError instead of exiting, and suggests the nearest flag."""

    def error(self, message: str):
        if unknown := re.match(r"unrecognized.*?(--[\w-]+)", message):
            nearest = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1, cutoff=0)
            message += f"; did you mean {nearest[0]}?"
        raise UserError(message, status=2) from None  # as argparse

    def parse_or_exit(self) -> argparse.Namespace:
        """The flags of the command line; if they are wrong, the process ends with one line."""
        try:
            return self.parse_args()
        except UserError as error:
            abort(error)
