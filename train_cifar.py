"""Train a ConViT on small pictures: CIFAR-10, CIFAR-100, any folder of your own, or generated patterns.

    python train_cifar.py                                     CIFAR-10 (170 MB download), nano model, two CPU cores
    python train_cifar.py --data-dir DIR --run runs/mine      your pictures: DIR/train/CLASS/*, DIR/test/CLASS/*
    python train_cifar.py --dataset patterns --epochs 3 --batch-size 32 --shift 0 --no-flip       no data needed
    python train_cifar.py --model convit_cifar --epochs 300 --batch-size 512 --amp --compile      on a GPU
    torchrun --nproc-per-node 2 -- train_cifar.py ...         on two

The run folder then holds config.json, metrics.jsonl, last.pt, best.pt, snapshots/ and three pictures;
`python app.py --run runs/cifar` shows what the heads have learned. demo/ is such a run, with what it took and gave.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from convit_min import MODELS, normalise
from training import checkpoint, distributed
from training.augment import erase, flip, mix, shift, soft_targets
from training.config import CORES, RunConfig, build_model
from training.data import (
    DATASETS,
    epoch_order,
    guess_dataset,
    hold_out,
    load_pictures,
    share_of_steps,
    subset,
    test_batches,
)
from training.flags import at_least, flag, fraction, parse_flags
from training.loop import (
    Interruption,
    MovingAverage,
    autocast,
    evaluate,
    learning_rate,
    parameter_groups,
    set_learning_rate,
    stream,
)
from training.report import end_epoch, progress_bar


@dataclass
class Config(RunConfig):
    dataset: str | None = flag(None, "by default a folder where --data-dir is one", type=str, choices=DATASETS)
    data_dir: str = flag("data", "where CIFAR is, or goes; or a folder that holds train/CLASS/* and test/CLASS/*")
    workers: int = flag(CORES, "threads that read a folder's pictures before training", type=at_least(0))
    hold_out: float | None = flag(
        None, "evaluate on this share of the training set, held back, and not on the test set", type=fraction
    )
    model: str = flag("convit_cifar_nano", "a name in convit_min.MODELS", choices=MODELS, metavar="NAME")
    img_size: int = flag(32, "side in pixels; other pictures are scaled and cropped to it", type=at_least(1))
    patch_size: int = flag(4, "side of a patch in pixels", type=at_least(1))
    run: str = flag("runs/cifar", "the folder to write; under torchrun one that all machines see")

    epochs: int = flag(30, "passes over the training set; by default an hour of two cores with --amp", type=at_least(1))
    batch_size: int = flag(32, "pictures a step, over all processes", type=at_least(1))
    lr: float = flag(1e-3, "peak learning rate")
    gate_lr_scale: float = flag(20.0, "the gates' rate in units of lr: Adam moves a gate by at most its rate a step")
    weight_decay: float = flag(0.05, "AdamW's, on matrices only")
    warmup_epochs: float = flag(1.0, "linear warm-up")
    shift: int = flag(4, "largest random shift in pixels", type=at_least(0))
    label_smoothing: float = flag(0.1, "share of the target given to all classes alike")
    mixup: float = flag(0.0, "parameter of mixup's Beta distribution; 0 is none")
    cutmix: float = flag(0.0, "parameter of cutmix's Beta distribution; 0 is none")
    random_erasing: float = flag(0.0, "share of the pictures that lose a rectangle to noise")
    ema_decay: float = flag(0.998, "moving average of the weights, the one that is evaluated and saved; 0 is none")


def train(config: Config):
    run, epochs = Path(config.run), config.total_epochs()
    try:
        device = distributed.start(config.device)
        config.dataset = config.dataset or guess_dataset(config.data_dir, Config.data_dir)
        train_set, test_set = load_pictures(config.dataset, config.data_dir, config.img_size, device, config.workers)
        if config.hold_out:
            train_set, test_set = hold_out(train_set, config.hold_out, config.seed)
        if config.data_fraction < 1:
            train_set = train_set.pick(subset(train_set.labels.cpu(), config.data_fraction, config.seed).to(device))
        at_once = config.batch_size // (distributed.world_size() * config.accumulate)
        classes, count = train_set.classes, len(train_set.labels)
        config.check(count)
        torch.manual_seed(config.seed)
        model = build_model(config, len(classes)).to(device)
        if config.eval:
            metrics = evaluate(model, test_batches(test_set, at_once), device, config.amp)
            scores = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            return distributed.say(f"{config.model} with {config.weights}: {scores}")
        ema = MovingAverage(model, config.ema_decay)
        groups = parameter_groups(model, config.weight_decay, config.gate_lr_scale)
        optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        parts = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
        state = checkpoint.begin(run, parts, config, device, count)
    except (ValueError, OSError) as error:
        distributed.leave(str(error))

    kind = "held-back" if config.hold_out else "test"
    distributed.say(f"{config.dataset} in {config.data_dir}: {count} training and {len(test_set.labels)} {kind} "
                    f"pictures of {len(classes)} classes; {config.model}, {device}")  # fmt: skip
    if state["epoch"] > epochs:
        return distributed.say(f"{run} has done its {epochs} epochs already; a larger --epochs goes on")
    parallel = DistributedDataParallel(model) if distributed.world_size() > 1 else model
    forward = torch.compile(parallel) if config.compile else parallel
    length = config.epoch_length(count)
    steps_per_epoch = length // config.batch_size
    steps, warmup_steps = epochs * steps_per_epoch, int(config.warmup_epochs * steps_per_epoch)
    probe = normalise(test_set.images[:: max(len(test_set.labels) // 128, 1)])  # some of every class, to watch heads on
    interruption = Interruption(config.save_every)

    for epoch in range(state["epoch"], epochs + 1):
        metrics = {"epoch": epoch, "step": epoch * steps_per_epoch}
        if epoch > 0:  # epoch 0 only looks at the model before training
            model.train()
            first, started = state["index"], time.perf_counter()
            loss_sum = torch.tensor(state["loss_sum"], device=device)
            order = epoch_order(count, config.seed, epoch, length=length).to(device)
            progress = progress_bar(epoch, first * config.batch_size, steps_per_epoch * config.batch_size)
            for index, chosen in enumerate(share_of_steps(order, config.batch_size, first), first + 1):
                step = (epoch - 1) * steps_per_epoch + index
                torch.manual_seed(stream(config.seed, step, distributed.rank()))  # a resumed run draws the same again
                rate = learning_rate(step - 1, steps, warmup_steps, config.lr)
                set_learning_rate(optimizer, rate)
                images = flip(shift(train_set.images[chosen], config.shift), config.flip)
                images = erase(normalise(images), config.random_erasing)
                targets = soft_targets(train_set.labels[chosen], len(classes), config.label_smoothing)
                if epoch <= epochs - config.plain_epochs:
                    images, targets = mix(images, targets, config.mixup, config.cutmix)
                parts_of_batch = zip(images.chunk(config.accumulate), targets.chunk(config.accumulate), strict=True)
                for number, (part, wanted) in enumerate(parts_of_batch, 1):
                    parallel.require_backward_grad_sync = number == config.accumulate  # DDP shares gradients once
                    with autocast(device, config.amp):
                        loss = F.cross_entropy(forward(part), wanted) / config.accumulate
                    scaler.scale(loss).backward()
                    loss_sum += loss.detach()
                if config.clip_grad > 0:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                ema.update_parameters(model)
                progress.update(config.batch_size)

                wish = interruption.after_step(step)
                if wish or index % 50 == 0 or index == steps_per_epoch:  # seldom: it makes the host wait for the device
                    total_loss = distributed.mean(loss_sum).item()
                    checkpoint.require_finite(total_loss, run, step, rate)
                    progress.set_postfix(loss=f"{total_loss / index:.3f}")
                if wish or index == steps_per_epoch:  # at the end, before evaluation
                    state |= {"epoch": epoch, "index": index, "loss_sum": total_loss}
                    checkpoint.save_last(run, parts, config, state)
                if wish == Interruption.STOP:
                    reason = f"stopped and saved after step {step}; the same command with --resume goes on"
                    distributed.leave(reason, interruption.status)
            progress.close()
            speed = (steps_per_epoch - first) * config.batch_size / (time.perf_counter() - started)
            mean_loss = distributed.mean(loss_sum).item() / steps_per_epoch
            metrics |= {"train_loss": mean_loss, "lr": optimizer.param_groups[0]["lr"], "images_per_second": speed}

        metrics |= evaluate(ema.module, test_batches(test_set, at_once), device, config.amp)
        end_epoch(run, parts, config, metrics, classes, probe, state)


def main():
    try:
        train(parse_flags(Config, __doc__))
        distributed.finish()
    except OSError as error:  # a full disk
        distributed.leave(str(error))


if __name__ == "__main__":
    main()
