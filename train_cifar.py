"""Train a ConViT on small images: CIFAR-10, CIFAR-100, any image folder, or synthetic patterns.

    python train_cifar.py                                     CIFAR-10 (170 MB download), nano model, on a CPU
    python train_cifar.py --data-dir DIR --run runs/mine      your images: DIR/train/CLASS/*, DIR/test/CLASS/*
    python train_cifar.py --dataset patterns --epochs 3 --crop-padding 0 --no-hflip               no data needed
    python train_cifar.py --model convit_cifar --epochs 300 --batch-size 512 --amp --compile      on a GPU
    torchrun --nproc-per-node 2 -- train_cifar.py ...         on two GPUs

The run folder contains config.json, provenance.json, metrics.jsonl, last.pt, best.pt, snapshots/, and plots; view it
with `python app.py --run runs/cifar`. demo/cifar10 is such a run.
"""

import signal
from dataclasses import dataclass

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends imports, data loading, and --eval without a traceback

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from analysis import head_statistics
from images import normalize
from training import distributed
from training.augment import mixup_cutmix, random_crop, random_erasing, random_hflip
from training.config import RunConfig, build_model, flag, parse_flags
from training.data import DATASETS, InMemoryData
from training.distributed import UserError
from training.evaluation import evaluate, evaluate_weights
from training.optim import ModelEMA, autocast, learning_rate, param_groups, set_learning_rate
from training.run import Run


@dataclass
class Config(RunConfig):
    # data and model
    dataset: str | None = flag(None, "default: inferred from --data-dir", choices=DATASETS)
    data_dir: str = flag("data", "CIFAR (downloaded if missing), or a folder with train/CLASS/* and test/CLASS/*")
    model: str = "convit_cifar_nano"
    img_size: int | None = flag(None, "image size in pixels (default: 32, with --eval that of the weights)", minimum=1)
    patch_size: int = flag(4, "patch size in pixels", minimum=1)
    run: str = "runs/cifar"
    # recipe; with --amp, 94 minutes on one CPU core with AMX
    epochs: int = 30
    batch_size: int = 32
    lr: float = 1e-3
    gate_lr_scale: float = 20.0
    warmup_epochs: float = 1.0
    weight_decay: float = 0.05
    ema_decay: float = 0.998
    crop_padding: int = flag(4, "zero-padding of the random crop, in pixels", minimum=0)
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    random_erasing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not self.eval:
            self.img_size = self.img_size or 32


def train(config: Config):
    # data and model
    device = distributed.init(config.device)
    data = InMemoryData(config, device)
    config.check(data.num_train)
    torch.manual_seed(config.seed)
    model = build_model(config, data.classes).to(device)

    # optimization
    model_ema = ModelEMA(model, config.ema_decay)
    groups = param_groups(model, config.weight_decay, config.gate_lr_scale)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    grad_accum_steps = config.grad_accum_steps

    # run folder: restores model, EMA, optimizer, and scaler with --resume
    run = Run(config, data, device, model=model, ema=model_ema, optimizer=optimizer, scaler=scaler)
    peak_lr = config.lr
    total_steps = config.total_epochs * run.steps_per_epoch
    warmup_steps = int(config.warmup_epochs * run.steps_per_epoch)
    ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True) if distributed.world_size() > 1 else model
    forward = torch.compile(ddp_model) if config.compile else ddp_model

    for epoch in run.epochs():  # epoch 0 only evaluates the initialization
        model.train()
        # batches of uint8 images on the device; run.steps reseeds the random draws for every step
        for step, (images, labels) in run.steps(epoch, data.train_batches(epoch, run.first_step)):
            # schedule: linear warm-up, then cosine decay; gates have their own scale
            lr = learning_rate(step, total_steps, warmup_steps, peak_lr)
            set_learning_rate(optimizer, lr)

            # augment on the device, every image with its own random draw; normalize is (x / 255 - mean) / std
            images = random_hflip(random_crop(images, config.crop_padding), config.hflip)
            images = random_erasing(normalize(images), config.random_erasing)
            targets = F.one_hot(labels, len(data.classes)).float()
            if epoch <= config.total_epochs - config.mixup_off_epochs:
                images, targets = mixup_cutmix(images, targets, config.mixup, config.cutmix)

            # forward and backward, one micro-batch at a time
            micro_batches = zip(images.chunk(grad_accum_steps), targets.chunk(grad_accum_steps), strict=True)
            for micro_step, (micro_images, micro_targets) in enumerate(micro_batches, 1):
                ddp_model.require_backward_grad_sync = micro_step == grad_accum_steps  # DDP: all-reduce only once
                with autocast(device, config.amp):
                    loss = criterion(forward(micro_images), micro_targets) / grad_accum_steps
                scaler.scale(loss).backward()
                run.loss_sum += loss.detach()

            # update the weights and their moving average
            if config.clip_grad > 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            model_ema.update_parameters(model)

            # progress, finite loss, checkpoint when due, clean stop
            run.after_step(step, lr)

        # evaluate the moving average of the weights, which best.pt and the snapshots contain
        metrics = evaluate(model_ema.module, data.eval_batches(), device, config.amp)
        heads = head_statistics(model_ema.module, data.sample_images)
        run.end_epoch(metrics, heads)


def main():
    try:
        config = parse_flags(Config, __doc__)
        evaluate_weights(config, InMemoryData) if config.eval else train(config)
    except (UserError, torch.OutOfMemoryError) as error:
        distributed.abort(error)
    distributed.cleanup()


if __name__ == "__main__":
    main()
