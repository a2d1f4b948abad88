"""What a training loop calls: schedule, optimiser groups, mixed precision, moving average, evaluation."""

import math
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convit_min import normalise
from training.data import Pictures, batches

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate(
    step: int, steps: int, warmup_steps: int, peak: float, start: float = 1e-6, end: float = 1e-5
) -> float:
    """Rate for step 0 .. steps - 1: a linear warm-up, then half a cosine down to `end` (the recipe of DeiT)."""
    if step < warmup_steps:  # 1. warm up from start, reaching the peak at the first step after
        return start + (peak - start) * step / warmup_steps
    progress = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)  # 2. 0 at the peak, 1 at the last step
    return end + (peak - end) * (1 + math.cos(math.pi * min(progress, 1))) / 2


def parameter_groups(model: nn.Module, weight_decay: float, gate_lr_scale: float = 1.0) -> list[dict]:
    """Groups for AdamW: decay for matrices only; the gates' learning rate is gate_lr_scale times that of the others.

    Not decayed: biases, norms, gates, pos_embed and cls_token; pos_proj.weight is, as in the paper's recipe.
    `lr_scale` in a group is for set_learning_rate.
    """
    matrices, plain, gates = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("gating_param"):
            group = gates
        elif parameter.ndim < 2 or name.endswith(("pos_embed", "cls_token")):
            group = plain
        else:
            group = matrices
        if parameter.requires_grad:
            group.append(parameter)
    return [
        {"params": matrices, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": gates, "weight_decay": 0.0, "lr_scale": gate_lr_scale},
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float):
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def autocast(device: torch.device, amp: str) -> AbstractContextManager:
    """Mixed precision in AMP_DTYPES[amp]; nothing for "off"."""
    return torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off")


def ema_average(decay: float):
    """avg_fn for torch's AveragedModel: an exponential moving average whose early steps forget faster."""

    def average(ema: Tensor, value: Tensor, updates: Tensor) -> Tensor:
        return ema.lerp(value, 1 - torch.clamp((1 + updates) / (10 + updates), max=decay))

    return average


@torch.inference_mode()
def evaluate(model: nn.Module, pictures: Pictures, batch_size: int, amp: str = "off") -> dict[str, float]:
    """Mean cross-entropy and accuracy in percent over all pictures, each counted once."""
    model.eval()
    device = pictures.images.device
    loss, correct = torch.zeros((), device=device), torch.zeros((), device=device)
    for images, labels in batches(pictures, batch_size):
        with autocast(device, amp):
            logits = model(normalise(images))
        loss += F.cross_entropy(logits.float(), labels, reduction="sum")
        correct += (logits.argmax(dim=1) == labels).sum()
    count = len(pictures.labels)
    return {"test_loss": loss.item() / count, "test_accuracy": 100 * correct.item() / count}
