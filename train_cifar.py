"""Train a ConViT on small pictures: CIFAR-10, CIFAR-100, or any folder of your own.

    python train_cifar.py                                     CIFAR-10 (170 MB download), nano model, two CPU cores
    python train_cifar.py --data-dir DIR --run runs/mine      your pictures: DIR/train/CLASS/*, DIR/test/CLASS/*
    python train_cifar.py --model convit_cifar --epochs 300 --batch-size 512 --amp --compile          on a GPU

The run folder then holds config.json, metrics.jsonl, last.pt, best.pt, snapshots/ and three pictures;
`python app.py --run runs/cifar` shows what the heads have learned. demo/ is such a run, with what it took and gave.
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

from analysis import head_statistics, read_metrics, uniform_non_locality
from convit_min import create_model, normalise
from training import checkpoint
from training.data import DATASETS, batches, crop_and_flip, guess_dataset, load_pictures
from training.flags import at_least, flag, parse_flags
from training.loop import autocast, ema_average, evaluate, learning_rate, parameter_groups, set_learning_rate
from training.plots import draw_run


@dataclass
class Config:
    dataset: str | None = flag(None, "by default a folder where --data-dir is one", type=str, choices=DATASETS)
    data_dir: str = flag("data", "where they are, or go; a folder that holds train/CLASS/* is used as it is")
    model: str = flag("convit_cifar_nano", "a name in convit_min.MODELS")
    img_size: int = flag(32, "side in pixels; other pictures are scaled and cropped to it", type=at_least(1))
    patch_size: int = flag(4, "side of a patch in pixels", type=at_least(1))
    gpsa_layers: int | None = flag(
        None, "how many blocks use GPSA; by default the model's own number", type=at_least(0)
    )
    epochs: int = flag(14, "passes over the training set; by default about an hour of two CPU cores", type=at_least(1))
    batch_size: int = flag(64, "pictures a step", type=at_least(1))
    lr: float = flag(1e-3, "peak learning rate")
    gate_lr_scale: float = flag(20.0, "the gates' rate in units of lr: Adam moves a gate by at most its rate a step")
    weight_decay: float = flag(0.05, "AdamW's, on matrices only")
    warmup_epochs: float = flag(1.0, "linear warm-up")
    label_smoothing: float = flag(0.1, "share of the target given to all classes alike")
    drop_path: float = flag(0.0, "stochastic depth of the last block")
    ema_decay: float = flag(0.998, "moving average of the weights, the one that is evaluated and saved; 0 is none")
    seed: int = flag(0, "of the initial weights, the order and the augmentation")
    amp: str = flag(
        "off", "mixed precision; alone means bf16", nargs="?", const="bf16", choices=["off", "bf16", "fp16"]
    )
    compile: bool = flag(False, "torch.compile the model")
    device: str = flag("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu", choices=["cuda", "cpu"])
    run: str = flag("runs/cifar", "the folder to write")
    resume: bool = flag(False, "go on with the run in --run after its last epoch")


def main():
    config = parse_flags(Config, __doc__)
    run, device = Path(config.run), torch.device(config.device)
    torch.manual_seed(config.seed)
    try:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no CUDA device on this machine")
        config.dataset = config.dataset or guess_dataset(config.data_dir, Config.data_dir)
        train_set, test_set = load_pictures(config.dataset, config.data_dir, config.img_size, device)
        steps_per_epoch = len(train_set.labels) // config.batch_size
        if steps_per_epoch == 0:
            count = len(train_set.labels)
            raise ValueError(f"{count} training pictures are fewer than --batch-size {config.batch_size}: lower it")
        changes = {name: getattr(config, name) for name in ("img_size", "patch_size", "drop_path", "gpsa_layers")}
        changes = {name: value for name, value in changes.items() if value is not None}
        model = create_model(config.model, num_classes=len(train_set.classes), **changes).to(device)
        ema = AveragedModel(model, avg_fn=ema_average(config.ema_decay))
        groups = parameter_groups(model, config.weight_decay, config.gate_lr_scale)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        parts = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
        first_epoch, best = 0, -1.0
        if config.resume:
            first_epoch, best = checkpoint.resume(run, parts, device)
        else:
            checkpoint.start_run(run, device)
        checkpoint.write_config(run, dataclasses.asdict(config))
    except (ValueError, OSError) as error:
        sys.exit(f"train_cifar.py: {error}")
    if first_epoch > config.epochs:
        sys.exit(f"train_cifar.py: the run in {run} has finished its {config.epochs} epochs")

    counts = f"{len(train_set.labels)} training and {len(test_set.labels)} test pictures"
    print(
        f"{config.dataset} in {config.data_dir}: {counts} of {len(train_set.classes)} classes; {config.model}, {device}"
    )
    forward = torch.compile(model) if config.compile else model
    steps, warmup_steps = config.epochs * steps_per_epoch, int(config.warmup_epochs * steps_per_epoch)
    probe = normalise(test_set.images[:: max(len(test_set.labels) // 128, 1)])  # some of every class, to watch heads on
    snapshots = checkpoint.snapshot_epochs(config.epochs)

    for epoch in range(first_epoch, config.epochs + 1):
        metrics = {"epoch": epoch}
        if epoch > 0:  # epoch 0 only looks at the model before training
            model.train()
            generator = torch.Generator().manual_seed(1000 * config.seed + epoch)
            total_loss, started = torch.zeros((), device=device), time.perf_counter()
            progress = tqdm(total=steps_per_epoch * config.batch_size, desc=f"epoch {epoch}", unit="img", leave=False)
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
                progress.update(len(images))
                if index % 50 == 49 or index == steps_per_epoch - 1:  # seldom: it makes the host wait for the device
                    mean_loss = total_loss.item() / (index + 1)
                    progress.set_postfix(loss=f"{mean_loss:.3f}")
                    if not math.isfinite(mean_loss):
                        sys.exit(
                            f"\ntrain_cifar.py: the loss is no longer finite at step {step + 1}, rate {rate:.2g}: "
                            f"start again with a lower --lr and another --run ({run} ends with epoch {epoch - 1})"
                        )
            progress.close()
            speed = steps_per_epoch * config.batch_size / (time.perf_counter() - started)
            metrics |= {"train_loss": mean_loss, "lr": rate, "images_per_second": speed}

        metrics |= evaluate(ema.module, test_set, config.batch_size, config.amp)
        heads = head_statistics(ema.module, probe)
        metrics["heads"] = {name: checkpoint.nested_list(value) for name, value in heads._asdict().items()}
        if metrics["test_accuracy"] > best:
            best = metrics["test_accuracy"]
            checkpoint.save_weights(ema.module, train_set.classes, epoch, run / "best.pt")
        if epoch in snapshots:
            file = run / "snapshots" / f"epoch_{epoch:04d}.pt"
            checkpoint.save_weights(ema.module, train_set.classes, epoch, file, half=True)
        checkpoint.append_metrics(run, metrics)
        checkpoint.save_last(run, parts, epoch, best)
        draw_run(read_metrics(run), run, uniform_non_locality(model.config.grid))
        print(f"epoch {epoch:3}  test accuracy {metrics['test_accuracy']:.2f}% (best {best:.2f}%)  "
              f"loss {metrics['test_loss']:.3f}  mean gate {heads.gate.nanmean():.2f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ntrain_cifar.py: stopped; once an epoch is saved, the same command with --resume goes on after it")
