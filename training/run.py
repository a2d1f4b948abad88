"""What a run shows while it trains, and what it writes at the end of an epoch."""

import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from analysis import head_statistics, read_metrics, uniform_non_locality
from training import checkpoint, distributed
from training.plots import draw_run


def progress_bar(epoch: int, done: int, total: int) -> tqdm:
    """Pictures a second and the time left of an epoch, on a terminal, once for all processes."""
    hidden = True if distributed.rank() > 0 else None  # None: where nobody watches
    return tqdm(initial=done, total=total, desc=f"epoch {epoch}", unit="img", leave=False, disable=hidden)


def end_epoch(run: Path, parts: dict, config, metrics: dict, classes: list[str], probe: Tensor, state: dict):
    """Write all files of a run for the epoch in `metrics`, and move `state`, where the run stands, to the next.

    `probe` are normalised pictures (b 3 H W) to watch the heads on. Raises OSError where there is no room.
    """
    epoch, model, accuracy, best = metrics["epoch"], parts["ema"].module, metrics["test_accuracy"], state["best"]
    state |= {"epoch": epoch + 1, "index": 0, "loss_sum": 0.0, "best": max(best, accuracy)}
    if distributed.rank() > 0:
        return
    tokens = math.prod(model.config.grid)
    at_once = max(1, min(16, 2**20 // tokens**2))  # all their maps are in memory
    heads = head_statistics(model, probe, batch_size=at_once)
    metrics = metrics | {"heads": {name: checkpoint.nested_list(value) for name, value in heads._asdict().items()}}
    if accuracy > best:
        checkpoint.save_weights(model, classes, epoch, run / "best.pt")
    if epoch in checkpoint.snapshot_epochs(config.total_epochs()):
        checkpoint.save_weights(model, classes, epoch, run / "snapshots" / f"epoch_{epoch:04d}.pt", half=True)
    checkpoint.append_metrics(run, metrics)
    if "images_per_second" in metrics:
        checkpoint.record_cost(run, metrics["images_per_second"])
    checkpoint.save_last(run, parts, config, state)
    draw_run(read_metrics(run), run, uniform_non_locality(model.config.grid))
    if config.tensorboard:
        write_events(run, metrics, heads)
    gate = "" if heads.gate.isnan().all() else f"  mean gate {heads.gate.nanmean():.2f}"
    print(f"epoch {epoch:3}  test accuracy {accuracy:.2f}% (best {state['best']:.2f}%)  "
          f"loss {metrics['test_loss']:.3f}{gate}", flush=True)  # fmt: skip


def write_events(run: Path, metrics: dict, heads):
    """The numbers of an epoch as events for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter  # here, since few have TensorBoard and few need it

    with SummaryWriter(run / "tensorboard") as writer:
        for name, value in metrics.items():
            if isinstance(value, float):
                writer.add_scalar(name, value, metrics["epoch"])
        for layer, gates in enumerate(heads.gate, 1):
            if not torch.isnan(gates).any():
                writer.add_scalar(f"mean gate/layer {layer}", gates.mean(), metrics["epoch"])
