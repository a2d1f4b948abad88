"""What a training loop calls: schedule, optimiser groups, mixed precision, moving average, signals, evaluation."""

import hashlib
import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from convit_min import ConViT, normalise
from training.distributed import largest, local_rank, total, world_size

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate(
    step: int, steps: int, warmup_steps: int, peak: float, start: float = 1e-6, end: float = 1e-5
) -> float:
    """Rate for step 0 .. steps - 1: a linear warm-up, then half a cosine down to `end` (the recipe of DeiT)."""
    if step < warmup_steps:  # 1. warm up from start, reaching the peak at the first step after
        return start + (peak - start) * step / warmup_steps
    progress = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)  # 2. 0 at the peak, 1 at the last step
    end = min(end, peak)
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


@contextmanager
def autocast(device: torch.device, amp: str) -> Iterator[None]:
    """Mixed precision in AMP_DTYPES[amp]; nothing for "off".

    On a CPU also explicit attention: the fused kernel is slow there in bf16, its backward pass most of all, and a
    training step of the nano model three times as fast without it.
    """
    explicit = ExplicitAttention() if device.type == "cpu" and amp != "off" else nullcontext()
    with torch.autocast(device.type, AMP_DTYPES[amp], enabled=amp != "off"), explicit:
        yield


class ExplicitAttention(TorchFunctionMode):
    """While entered, scaled_dot_product_attention is softmax(q k^T / sqrt(d)) v as written, in the type of q, k and v.

    PyTorch's own unfused kernel (SDPBackend.MATH) computes in float32, and looks for rows that are masked as a whole.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        q, k, v = args
        return (q.shape[-1] ** -0.5 * q @ k.mT).softmax(dim=-1) @ v


class MovingAverage(AveragedModel):
    """A copy of a model with the exponential moving average of its weights, whose early steps forget faster.

    torch's own update sends its counter to the device, and so makes the host wait for the device in every step.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module):
        updates = int(self.n_averaged)  # on the CPU
        keep = min((1 + updates) / (10 + updates), self.decay) if updates else 0.0
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - keep)
        self.n_averaged += 1


def stream(*numbers) -> int:
    """A seed for torch.manual_seed that differs for every tuple of numbers (or words)."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "big")


class Interruption:
    """Signals and saving times, asked once a step: all processes get the same answer after the same step.

    SIGTERM and Ctrl-C only take note, so that the step under way is finished and saved.
    """

    GO_ON, SAVE, STOP = 0, 1, 2

    def __init__(self, save_every: str | None):
        """`save_every` is a number of steps, minutes as in "10m", or None."""
        self.heard, self.saved_at, self.save_every = 0, time.monotonic(), save_every
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def after_step(self, step: int) -> int:
        """GO_ON, SAVE or STOP."""
        if self.save_every is None:
            due = False
        elif self.save_every.endswith("m"):
            due = time.monotonic() - self.saved_at > 60 * int(self.save_every[:-1])
        else:
            due = step % int(self.save_every) == 0
        answer = largest(self.STOP if self.heard else self.SAVE if due else self.GO_ON)
        if answer != self.GO_ON:
            self.saved_at = time.monotonic()
        return answer

    @property
    def status(self) -> int:
        """What a process that a signal has ended returns, by convention."""
        return 128 + (self.heard or signal.SIGTERM)

    def _note(self, number: int, _):
        self.heard = number
        if local_rank() == 0:
            print("\nstopping after this step", file=sys.stderr, flush=True)
        if world_size() == 1:  # torchrun may pass on what has come already
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once


@torch.inference_mode()
def evaluate(model: ConViT, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, amp: str) -> dict:
    """Mean cross-entropy, and accuracy in percent (top 1 and top 5), of the batches of all processes together.

    Batches are pictures of 0..255 and labels, on the device; each picture should be in one of them.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # pictures, loss, right at first, right among five
    for images, labels in batches:
        with autocast(device, amp):
            logits = model(normalise(images))
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        sums += torch.stack([torch.full_like(loss, len(labels)), loss, ranked[:, 0].sum(), ranked.sum()])
    count, loss, first, among_five = total(sums).tolist()
    metrics = {"test_loss": loss / count, "test_accuracy": 100 * first / count}
    return metrics | ({"test_accuracy_top5": 100 * among_five / count} if model.config.num_classes > 5 else {})
