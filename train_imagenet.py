"""Train a ConViT on ImageNet, or any big tree of pictures, by the recipe of the paper (that of DeiT).

    python train_imagenet.py --data-dir /data/imagenet --amp --compile                                     one GPU
    torchrun --nproc-per-node 8 -- train_imagenet.py --data-dir /data/imagenet --amp --compile             eight
    python train_imagenet.py --data-dir /data/imagenet --eval --weights convit_tiny                        evaluate
    python train_imagenet.py --data-dir DIR --weights convit_tiny --epochs 30 --lr 5e-5 --run runs/mine    fine-tune
    python train_imagenet.py --dataset patterns --model convit_cifar_nano --epochs 9 --batch-size 64       try, no data

DIR holds train/CLASS/* and val/CLASS/*. Published for 300 epochs: 73.1, 81.3, 82.4% top-1 (convit_tiny, _small, _base);
this script has not been run that far by its authors. The loop is that of train_cifar.py; `diff` shows what differs.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from convit_min import MODELS, normalise
from training import checkpoint, distributed
from training.augment import colour_jitter, erase, flip, mix, soft_targets
from training.config import CORES, RunConfig, build_model
from training.data import subset
from training.files import evaluation_batches, generated, load, open_tree, training_batches
from training.flags import at_least, flag, parse_flags
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
    dataset: str = flag("imagenet", "folder is any other tree of pictures", choices=["imagenet", "folder", "patterns"])
    data_dir: str = flag("data", "the folder that holds train/CLASS/* and val/CLASS/*; to evaluate, val/ will do")
    workers: int = flag(CORES, "processes that read pictures ahead, for each that trains", type=at_least(0))
    run: str = flag("runs/imagenet", "the folder to write; under torchrun one that all machines see")
    skip_bad_images: bool = flag(False, "name files that cannot be read, and go on without them")

    lr: float = flag(5e-4, "peak learning rate for a batch of 512, scaled in proportion for others")
    gate_lr_scale: float = flag(1.0, "the gates' rate in units of lr; above 1 where steps are few")
    weight_decay: float = flag(0.05, "AdamW's, on matrices only")
    warmup_epochs: float = flag(5.0, "linear warm-up")
    drop_path: float = flag(0.1, "stochastic depth of the last block")
    label_smoothing: float = flag(0.1, "share of the target given to all classes alike")
    rand_augment: int = flag(9, "RandAugment's magnitude, 0 to 10, two operations a picture", type=at_least(0))
    colour_jitter: float = flag(0.0, "largest change of brightness, contrast, saturation, for use without RandAugment")
    mixup: float = flag(0.8, "parameter of mixup's Beta distribution; 0 is none")
    cutmix: float = flag(1.0, "parameter of cutmix's Beta distribution; 0 is none")
    random_erasing: float = flag(0.25, "share of the pictures that lose a rectangle to noise")
    repeats: int = flag(3, "repeated augmentation: times that a picture comes in an epoch", type=at_least(1))
    ema_decay: float = flag(0.99996, "moving average of the weights, the one that is evaluated and saved; 0 is none")


def train(config: Config):
    run, epochs = Path(config.run), config.total_epochs()
    try:
        device = distributed.start(config.device)
        size = config.img_size or MODELS[config.model].img_size
        if config.dataset == "patterns":
            train_set, test_set, classes = generated(size)
        else:
            data = Path(config.data_dir)
            train_set, test_set, classes = open_tree(data, size, config.rand_augment, config.eval)
        chosen = subset(train_set.labels, config.data_fraction, config.seed)
        count = len(chosen)
        config.check(count)
        at_once = config.batch_size // (distributed.world_size() * config.accumulate)
        test_batches = evaluation_batches(len(test_set), at_once)
        peak = config.lr * config.batch_size / 512
        torch.manual_seed(config.seed)
        model = build_model(config, len(classes)).to(device)
        if config.eval:
            metrics = evaluate(model, load(test_set, test_batches, config.workers, device), device, config.amp)
            scores = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            return distributed.say(f"{config.model} with {config.weights}: {scores}")
        ema = MovingAverage(model, config.ema_decay)
        groups = parameter_groups(model, config.weight_decay, config.gate_lr_scale)
        optimizer = torch.optim.AdamW(groups, lr=peak, fused=True)
        scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        parts = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}
        state = checkpoint.begin(run, parts, config, device, count)
    except (ValueError, OSError) as error:
        distributed.leave(str(error))

    distributed.say(f"{config.dataset} in {config.data_dir}: {count} training and {len(test_set)} validation pictures "
                    f"of {len(classes)} classes; {config.model}, {device}")  # fmt: skip
    if state["epoch"] > epochs:
        return distributed.say(f"{run} has done its {epochs} epochs already; a larger --epochs goes on")
    parallel = DistributedDataParallel(model) if distributed.world_size() > 1 else model
    forward = torch.compile(parallel) if config.compile else parallel
    length = config.epoch_length(count)
    steps_per_epoch = length // config.batch_size
    steps, warmup_steps = epochs * steps_per_epoch, int(config.warmup_epochs * steps_per_epoch)
    spread = range(0, len(test_set), max(len(test_set) // 64, 1))  # some of every class, to watch heads on
    probe = normalise(torch.stack([test_set[index, 0][0] for index in spread]).to(device))
    interruption = Interruption(config.save_every)

    for epoch in range(state["epoch"], epochs + 1):
        metrics = {"epoch": epoch, "step": epoch * steps_per_epoch}
        if epoch > 0:  # epoch 0 only looks at the model before training
            model.train()
            first, started = state["index"], time.perf_counter()
            loss_sum = torch.tensor(state["loss_sum"], device=device)
            keys = training_batches(chosen, config.batch_size, config.seed, epoch, first, config.repeats, length)
            batches = load(train_set, keys, config.workers, device, config.skip_bad_images)
            progress = progress_bar(epoch, first * config.batch_size, steps_per_epoch * config.batch_size)
            for index, (images, labels) in enumerate(batches, first + 1):
                step = (epoch - 1) * steps_per_epoch + index
                torch.manual_seed(stream(config.seed, step, distributed.rank()))  # a resumed run draws the same again
                rate = learning_rate(step - 1, steps, warmup_steps, peak)
                set_learning_rate(optimizer, rate)
                images = colour_jitter(flip(images, config.flip), config.colour_jitter)
                images = erase(normalise(images), config.random_erasing)
                targets = soft_targets(labels, len(classes), config.label_smoothing)
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

        pictures = load(test_set, test_batches, config.workers, device)
        metrics |= evaluate(ema.module, pictures, device, config.amp)
        end_epoch(run, parts, config, metrics, classes, probe, state)


def main():
    try:
        train(parse_flags(Config, __doc__))
        distributed.finish()
    except OSError as error:  # a full disk
        distributed.leave(str(error))


if __name__ == "__main__":
    main()
