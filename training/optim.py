"""Learning-rate schedule, parameter groups, mixed precision, and the moving average of the weights."""

import math

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak_lr: float) -> float:
    """Learning rate of step 0 .. total_steps - 1: linear warm-up, then half cosine.

    Starts at 1e-6 and ends at 1e-5, as in DeiT; a peak below 1e-4 ends at a tenth of itself.
    """
    start_lr, end_lr = min(1e-6, peak_lr), min(1e-5, peak_lr / 10)
    # 1. warm up from start_lr; the first step after it has peak_lr
    if step < warmup_steps:
        return start_lr + (peak_lr - start_lr) * step / warmup_steps
    # 2. decay to end_lr at the last step
    progress = (step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1)
    return end_lr + (peak_lr - end_lr) * (1 + math.cos(math.pi * min(progress, 1))) / 2


def param_groups(model: nn.Module, weight_decay: float, gate_lr_scale: float = 1.0) -> list[dict]:
    """Groups for AdamW: weight decay for matrices only; gates train at gate_lr_scale times the learning rate.

    Biases, norms, gates, pos_embed, and cls_token do not decay; pos_proj.weight does, as in the paper's recipe.
    `set_learning_rate` reads `lr_scale`.
    """
    matrices, others, gates = [], [], []
    for name, param in model.named_parameters():
        if param.requires_grad:
            is_matrix = param.ndim > 1 and not name.endswith(("pos_embed", "cls_token"))
            group = gates if name.endswith("gating_param") else matrices if is_matrix else others
            group.append(param)
    return [
        {"params": matrices, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": others, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": gates, "weight_decay": 0.0, "lr_scale": gate_lr_scale},
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float):
    """Set the learning rate of every group, times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """Mixed precision, "bf16" or "fp16"; disabled for "off"."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


class ModelEMA(AveragedModel):
    """A copy of a model with the exponential moving average of its weights; the decay ramps up in early steps.

    PyTorch's own update moves its counter to the device, which synchronizes with the GPU in every step.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module):
        num_updates = int(self.n_averaged)  # on the CPU
        decay = min((1 + num_updates) / (10 + num_updates), self.decay) if num_updates else 0.0
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - decay)
        self.n_averaged += 1
