"""One process or many under torchrun; every function here means the same in a single process."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Which process this is; 0 is the one that writes and prints."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Which process of its machine this is."""
    return int(os.environ.get("LOCAL_RANK", 0))


def job() -> str | None:
    """A name for all that one torchrun command starts, restarts after failures included; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"torchrun {os.getppid()}" if name == "none" else name


def restarted() -> bool:
    """Whether torchrun has started these processes again, because some of them had died."""
    return largest(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))) > 0  # not every machine counts every time


def start(device_type: str) -> torch.device:
    """Join the group of processes that torchrun has made, if it has; return the device of this process.

    Raises ValueError where there is no GPU for it.
    """
    index, processes = local_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device_type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch finds no CUDA device on this machine")
        if processes > torch.cuda.device_count():
            raise ValueError(f"torchrun's --nproc-per-node is more than the {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(index)
        torch.set_float32_matmul_precision("high")  # TF32 where no --amp is given
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo")
    return torch.device(device_type, index) if device_type == "cuda" else torch.device("cpu")


def say(message: str):
    """Print, once for all processes."""
    if rank() == 0:
        print(message, flush=True)


def leave(message: str, status: int = 1) -> NoReturn:
    """End the process; the first one of every machine says why."""
    if local_rank() == 0:
        print(f"\n{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # or the DataLoader would complain of what comes now
    for worker in multiprocessing.active_children():
        worker.terminate()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


def finish():
    """Leave the group together: a process that is gone early would bring the others down as they end."""
    wait()
    if dist.is_initialized():
        dist.destroy_process_group()


def wait():
    """Go on once all processes have come here."""
    largest(0)


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    return total(value) / world_size()


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value


def largest(value: int) -> int:
    """The largest of the numbers that the processes give."""
    if not dist.is_initialized():
        return value
    agreed = torch.tensor(value)  # on the CPU: it waits for no GPU
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return int(agreed)
