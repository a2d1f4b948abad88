"""Train a ConViT on ImageNet, or any large image folder, with the hyperparameters of the paper (those of DeiT).

    python train_imagenet.py --data-dir /data/imagenet --amp --compile                                     one GPU
    torchrun --nproc-per-node 8 -- train_imagenet.py --data-dir /data/imagenet --amp --compile             eight
    python train_imagenet.py --data-dir /data/imagenet --eval --weights convit_tiny                        evaluate
    python train_imagenet.py --data-dir DIR --weights convit_tiny --epochs 30 --lr 5e-5 --run runs/mine    fine-tune
    python train_imagenet.py --dataset patterns --model convit_cifar_nano --epochs 9 --batch-size 64       no data

DIR contains train/CLASS/* and val/CLASS/*. Published results after 300 epochs: 73.1, 81.3, 82.4% top-1 (convit_tiny,
_small, _base); this script has not been run that far yet. Unlike the authors' code, it evaluates the EMA weights, uses
torchvision's operations of RandAugment, at a fixed magnitude, and draws mixup per image. The loop is that of
train_cifar.py: compare them with `diff`.
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
from training.augment import mixup_cutmix, random_erasing, random_hflip
from training.config import RunConfig, build_model, flag, parse_flags
from training.distributed import UserError
from training.evaluation import evaluate, evaluate_weights
from training.image_folder import load_data
from training.optim import ModelEMA, autocast, learning_rate, param_groups, set_learning_rate
from training.run import Run


@dataclass
class Config(RunConfig):
    # data and model
    dataset: str = flag("imagenet", "folder: any other image folder", choices=["imagenet", "folder", "patterns"])
    data_dir: str = flag("data", "folder with train/CLASS/* and val/CLASS/*; val/ suffices for --eval")
    model: str = "convit_tiny"
    drop_path: float = 0.1
    run: str = "runs/imagenet"
    # recipe
    epochs: int = 300
    batch_size: int = 512
    lr: float = flag(5e-4, "peak learning rate per 512 images, scaled linearly with --batch-size", minimum=0)
    gate_lr_scale: float = 1.0
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05
    ema_decay: float = 0.99996
    rand_augment: int = flag(9, "RandAugment magnitude, two operations with p = 1/2 each (0: off)", choices=range(11))
    aug_repeats: int = flag(3, "repeated augmentation: times a sampled image appears per epoch", minimum=1)
    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    random_erasing: float = 0.25


def train(config: Config):
    # data and model
    device = distributed.init(config.device)
    data = load_data(config, device)
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
    peak_lr = config.lr * config.batch_size / 512
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
            images = random_hflip(images, config.hflip)
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
        evaluate_weights(config, load_data) if config.eval else train(config)
    except (UserError, torch.OutOfMemoryError) as error:
        distributed.abort(error)
    distributed.cleanup()


if __name__ == "__main__":
    main()
