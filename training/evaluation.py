"""Loss and accuracy of a model on a dataset."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from convit_min import ConViT
from images import normalize
from training.distributed import all_reduce_sum
from training.optim import autocast


@torch.inference_mode()
def evaluate(model: ConViT, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, amp: str) -> dict:
    """Mean cross-entropy, and top-1 and top-5 accuracy in percent, over the batches of all processes.

    Batches are pixels in 0..255 (b 3 H W) and labels (b), on the device; every image is in one batch of one process.
    """
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # images, loss, correct, correct among the first five
    for images, labels in batches:
        with autocast(device, amp):
            logits = model(normalize(images))
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        totals += torch.stack([torch.full_like(loss, len(labels)), loss, hits[:, 0].sum(), hits.sum()])
    num_images, loss, top1, top5 = all_reduce_sum(totals).tolist()
    metrics = {"test_loss": loss / num_images, "test_accuracy": 100 * top1 / num_images}
    return metrics | ({"test_accuracy_top5": 100 * top5 / num_images} if model.config.num_classes > 5 else {})
