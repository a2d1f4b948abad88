"""Train a ConViT on small pictures: CIFAR-10, CIFAR-100, or any folder of your own.

    python train_cifar.py                                     CIFAR-10 (170 MB download), nano model
    python train_cifar.py --data-dir DIR --run runs/mine      DIR/train/CLASS/*, DIR/test/CLASS/*
    python train_cifar.py --model convit_cifar --epochs 300 --batch-size 512 --amp --compile      on a GPU

The run folder then holds config.json, metrics.jsonl, last.pt, best.pt, snapshots/ and three pictures;
`python app.py --run runs/cifar` shows what the heads have learned.
"""

import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from analysis import head_statistics, uniform_non_locality
from convit_min import create_model, normalise
from training import checkpoint
from training.data import batches, crop_and_flip, load_pictures
from training.flags import flag, parse_flags
from training.loop import autocast, ema_average, evaluate, learning_rate, parameter_groups, set_learning_rate
from training.plots import draw_run


@dataclass
class Config:
    dataset: str = flag("cifar10", "which pictures", choices=["cifar10", "cifar100", "folder"])
    data_dir: str = flag("data", "where they are, or go; a folder that holds train/CLASS/* is used as it is")
    model: str = flag("convit_cifar_nano", "a name in convit_min.MODELS")
    img_size: int = flag(32, "side in pixels; other pictures are scaled and cropped to it")
    patch_size: int = flag(4, "side of a patch in pixels")
    gpsa_layers: int | None = flag(None, "how many blocks use GPSA; by default the model's own number", type=int)
    epochs: int = flag(14, "passes over the training set")
    batch_size: int = flag(64, "pictures a step")
    lr: float = flag(1e-3, "peak learning rate")
    gate_lr_scale: float = flag(
        20.0, "the gates' rate in units of lr: Adam moves a gate by no more than its rate a step"
    )
    weight_decay: float = flag(0.05, "AdamW's, on matrices only")
    warmup_epochs: float = flag(1.0, "linear warm-up")
    label_smoothing: float = flag(0.1, "share of the target given to all classes alike")
    drop_path: float = flag(0.0, "stochastic depth of the last block")
    ema_decay: float = flag(0.998, "moving average of the weights, which is what gets evaluated and saved; 0 is none")
    seed: int = flag(0, "of the initial weights, the order and the augmentation")
    amp: str = flag(
        "off", "mixed precision; alone means bf16", nargs="?", const="bf16", choices=["off", "bf16", "fp16"]
    )
    compile: bool = flag(False, "torch.compile the model")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")
    run: str = flag("runs/cifar", "the folder to write")
    resume: bool = flag(False, "go on with the run in --run from its last epoch")


def main():
    config = parse_flags(Config, __doc__)
    run, device = Path(config.run), torch.device(config.device)
    torch.manual_seed(config.seed)
    try:
        sets = load_pictures(config.dataset, config.data_dir, config.img_size)
        train_set, test_set = (pictures.to(device) for pictures in sets)
        shape = {"img_size": config.img_size, "patch_size": config.patch_size, "num_classes": len(train_set.classes)}
        if config.gpsa_layers is not None:
            shape["gpsa_layers"] = config.gpsa_layers
        model = create_model(config.model, drop_path=config.drop_path, **shape).to(device)
        if config.batch_size > len(train_set.labels):
            raise ValueError(
                f"--batch-size {config.batch_size} is more than the {len(train_set.labels)} training pictures"
            )
        if not config.resume:
            checkpoint.start_run(run, dataclasses.asdict(config), device)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"train_cifar.py: {error}")

    optimizer = torch.optim.AdamW(parameter_groups(model, config.weight_decay, config.gate_lr_scale), fused=True)
    ema = AveragedModel(model, avg_fn=ema_average(config.ema_decay))
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    forward = torch.compile(model) if config.compile else model
    steps_per_epoch = len(train_set.labels) // config.batch_size
    steps, warmup_steps = config.epochs * steps_per_epoch, int(config.warmup_epochs * steps_per_epoch)
    first_epoch, best = 0, -1.0
    if config.resume:
        last = torch.load(run / "last.pt", map_location=device, weights_only=True)
        model.load_state_dict(last["model"])
        ema.load_state_dict(last["ema"])
        optimizer.load_state_dict(last["optimizer"])
        scaler.load_state_dict(last["scaler"])
        torch.set_rng_state(last["rng"].cpu())
        first_epoch, best = last["epoch"] + 1, last["best"]
    probe = normalise(test_set.images[:: max(len(test_set.labels) // 128, 1)])  # some of every class, to watch heads on
    uniform = uniform_non_locality(model.config.grid)

    for epoch in range(first_epoch, config.epochs + 1):
        metrics = {"epoch": epoch}
        if epoch > 0:  # epoch 0 is the model before training
            model.train()
            generator = torch.Generator().manual_seed(1000 * config.seed + epoch)
            total_loss, started = torch.zeros((), device=device), time.perf_counter()
            with tqdm(total=steps_per_epoch * config.batch_size, desc=f"epoch {epoch}", unit="img", leave=False) as bar:
                for index, (images, labels) in enumerate(batches(train_set, config.batch_size, generator)):
                    step = (epoch - 1) * steps_per_epoch + index
                    rate = learning_rate(step, steps, warmup_steps, config.lr)
                    set_learning_rate(optimizer, rate)
                    with autocast(device, config.amp):
                        logits = forward(normalise(crop_and_flip(images, generator)))
                        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                    ema.update_parameters(model)
                    total_loss += loss.detach()
                    bar.update(len(images))
            metrics["train_loss"] = total_loss.item() / steps_per_epoch
            metrics["lr"] = rate
            metrics["images_per_second"] = steps_per_epoch * config.batch_size / (time.perf_counter() - started)
            if not math.isfinite(metrics["train_loss"]):
                sys.exit(
                    f"train_cifar.py: the loss is not finite in epoch {epoch} (learning rate {rate:.2g}); lower --lr. "
                    f"{run}/last.pt holds the epoch before."
                )

        metrics |= evaluate(ema.module, test_set, config.batch_size, config.amp)
        heads = head_statistics(ema.module, probe)
        metrics["heads"] = {name: checkpoint.nested_list(value) for name, value in heads._asdict().items()}
        weights = checkpoint.model_record(ema.module, train_set.classes, epoch)
        if metrics["test_accuracy"] > best:
            best = metrics["test_accuracy"]
            checkpoint.save(weights, run / "best.pt")
        if epoch in checkpoint.snapshot_epochs(config.epochs):
            weights["model"] = {key: value.half() for key, value in weights["model"].items()}
            checkpoint.save(weights, run / "snapshots" / f"epoch_{epoch:04d}.pt")
        checkpoint.append_metrics(run, metrics)
        checkpoint.save(
            {
                "model": model.state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "rng": torch.get_rng_state(),
                "epoch": epoch,
                "best": best,
            },
            run / "last.pt",
        )
        draw_run(checkpoint.read_metrics(run), run, uniform)
        print(f"epoch {epoch:3}  test accuracy {metrics['test_accuracy']:.2f}%  loss {metrics['test_loss']:.3f}  "
              f"mean gate {heads.gate.nanmean():.2f}  best {best:.2f}%", flush=True)  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ntrain_cifar.py: stopped; the same command with --resume goes on after the last whole epoch")
