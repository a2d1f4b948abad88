"""What both training scripts share before their loops: the flags beside the recipe, and the model they make."""

import dataclasses
import os
import re
import warnings
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from convit_min import MODELS, ConViT, ConViTConfig, create_model, freeze_gpsa, load_weights
from training.distributed import say, world_size
from training.flags import at_least, flag, fraction


def interval(text: str) -> str:
    """An argparse type: a number of steps, or of minutes as in 10m."""
    if not re.fullmatch(r"[1-9]\d*m?", text):
        raise ValueError(text)
    return text


cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # given to us
CORES = max(1, min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 8))  # for each process of this machine


@dataclass
class RunConfig:
    """Flags of both scripts; each adds its data sets and its recipe."""

    data_fraction: float = flag(1.0, "train on this share of every class, drawn by --seed", type=fraction)
    scale_epochs: bool = flag(False, "1 / --data-fraction times the epochs: as many steps as with all data (Table 2)")

    model: str = flag("convit_tiny", "a name in convit_min.MODELS", choices=MODELS, metavar="NAME")
    weights: str | None = flag(None, "start from these: a file, or the name of released ones; a new head where needed")
    img_size: int | None = flag(None, "side in pixels; by default the model's own", type=at_least(1))
    patch_size: int | None = flag(None, "side of a patch in pixels; by default the model's own", type=at_least(1))
    gpsa_layers: int | None = flag(None, "blocks that use GPSA; by default the model's own", type=at_least(0))
    locality_strength: float = flag(1.0, "alpha of the convolutional init")
    conv_init: bool = flag(True, "start GPSA as a convolution")
    gating: str = flag("learned", "frozen keeps the gates where they start", choices=["learned", "frozen"])
    gate_init: float = flag(1.0, "the gates before training, as logits: 1 is 0.73 position, 0 is half and half")
    freeze_gpsa: bool = flag(False, "do not train the attention of GPSA at all: qk, v, position and gates")
    pool: str = flag("token", "classify from the class token or the mean of patch tokens", choices=["token", "mean"])
    drop_path: float = flag(0.0, "stochastic depth of the last block")

    warmup_epochs: float = flag(5.0, "linear warm-up")
    epochs: int = flag(300, "passes over the training set", type=at_least(1))
    batch_size: int = flag(512, "pictures a step, over all processes", type=at_least(1))
    epoch_steps: int | None = flag(
        None, "steps of an epoch, so between evaluations; by default one pass over the training set", type=at_least(1)
    )
    accumulate: int = flag(1, "parts that a batch is computed in, where it does not fit in memory", type=at_least(1))
    clip_grad: float = flag(0.0, "largest norm of the gradient; 0 is no limit")
    flip: bool = flag(True, "mirror half of the pictures; not for digits or letters")
    plain_epochs: int = flag(0, "how many epochs at the end go without mixup and cutmix", type=at_least(0))

    seed: int = flag(0, "of the initial weights, the order and the augmentation")
    amp: str = flag(
        "off", "mixed precision; alone means bf16", nargs="?", const="bf16", choices=["off", "bf16", "fp16"]
    )
    compile: bool = flag(False, "torch.compile the model")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu", choices=["cuda", "cpu"])
    tensorboard: bool = flag(False, "write events for TensorBoard, too")
    run: str = flag("runs/run", "the folder to write")
    save_every: str | None = flag(
        None, "save within epochs, too: every so many steps, or minutes as in 10m", type=interval
    )
    resume: bool = flag(False, "go on with the run in --run where it was last saved")
    eval: bool = flag(False, "only evaluate: --weights, or else the best of --run")

    def __post_init__(self):
        if self.eval and not self.weights:
            self.weights = f"{self.run}/best.pt"

    def check(self, count: int):
        """Raise ValueError where `count` training pictures cannot be shared out as asked, or a package is missing."""
        if self.tensorboard and not find_spec("tensorboard"):
            raise ValueError("--tensorboard needs a package: pip install tensorboard")
        if self.amp == "bf16" and self.device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError("this GPU has no bf16: use --amp fp16")
        processes = world_size() * self.accumulate
        if self.batch_size % processes:
            raise ValueError(
                f"--batch-size {self.batch_size} must be a multiple of processes x --accumulate = {processes}"
            )
        if count < self.batch_size and not self.eval:
            raise ValueError(f"{count} training pictures are fewer than --batch-size {self.batch_size}: lower it")
        if self.epoch_steps and self.scale_epochs:
            raise ValueError("--epoch-steps and --scale-epochs both say how long a run is: leave one of them out")
        if self.warmup_epochs >= self.total_epochs() and not self.eval:
            say(f"note: the {self.warmup_epochs:g} epochs of --warmup-epochs last the whole run")

    def total_epochs(self) -> int:
        """The epochs of the whole run."""
        return round(self.epochs / self.data_fraction) if self.scale_epochs else self.epochs

    def epoch_length(self, count: int) -> int:
        """The pictures of an epoch, where there are `count` to train on."""
        return self.epoch_steps * self.batch_size if self.epoch_steps else count


# what a run may be resumed with otherwise than it began: where and how it runs, how long and how fast it learns
MAY_CHANGE = {"data_dir", "run", "resume", "eval", "weights", "device", "compile", "workers", "save_every"}
MAY_CHANGE |= {"tensorboard", "skip_bad_images", "epochs", "lr"}


def build_model(config: RunConfig, num_classes: int) -> ConViT:
    """The model that the flags describe. Raises ValueError for what cannot work, and for weights that do not fit."""
    names = {field.name for field in dataclasses.fields(ConViTConfig)} & vars(config).keys()
    changes = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    model = create_model(config.model, num_classes=num_classes, **changes)
    if config.weights and (config.eval or not config.resume):
        with warnings.catch_warnings():
            if config.eval:  # a head that does not fit stays random: fine to start from, senseless to evaluate
                warnings.simplefilter("error", UserWarning)
            try:
                load_weights(model, config.weights)
            except UserWarning as warning:
                raise ValueError(f"--eval needs weights with the same classes: {warning}") from warning
    if config.freeze_gpsa:
        freeze_gpsa(model)
    return model


def same_run(config: RunConfig, saved: dict):
    """Raise ValueError where --resume comes with other flags than the run has that its state depends on."""
    for name, now in vars(config).items():
        if name not in MAY_CHANGE and now != saved.get(name):
            flag_name = "--" + name.replace("_", "-")
            raise ValueError(
                f"the run has {flag_name} {saved.get(name)}, not {now}: leave the flag out, or choose another --run"
            )
