"""Single- and multi-process training under torchrun: every function here also works without torchrun."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


class UserError(Exception):
    """Something the user can change: the message says in one sentence what is wrong and what to do."""

    def __init__(self, message: str, status: int = 1):
        """`status` is the exit status of the process."""
        super().__init__(message)
        self.status = status


class Stopped(UserError):
    """A signal stopped training, and its state was saved."""


def rank() -> int:
    """Index of this process; rank 0 writes files and prints."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Index of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def job_id() -> str | None:
    """An id of the torchrun job, the same after an automatic restart; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"torchrun {os.getppid()}" if name == "none" else name


def was_restarted() -> bool:
    """Whether torchrun has restarted the job after a failure."""
    return all_reduce_max(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))) > 0  # machines may count differently


def init(device_type: str) -> torch.device:
    """Join the process group if torchrun started this process; return the device to use.

    Raises UserError for a device that is not supported, or if there is no GPU for this process.
    """
    if device_type not in ("cuda", "cpu"):
        raise UserError(f"--device {device_type} is not supported: use --device cpu, or cuda")
    if device_type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch finds no CUDA device on this machine; use --device cpu")
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
            raise UserError(f"torchrun's --nproc-per-node exceeds the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(local_rank())
        torch.set_float32_matmul_precision("high")  # TF32 without --amp
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))  # rank 0 may download or list a dataset
    return torch.device("cuda", local_rank()) if device_type == "cuda" else torch.device("cpu")


def print0(message: str):
    """Print on rank 0 only."""
    if rank() == 0:
        print(message, flush=True)


def abort(error: UserError | torch.OutOfMemoryError) -> NoReturn:
    """Kill data workers, print an error (once per machine if all of its ranks raise it), and exit."""
    if isinstance(error, torch.OutOfMemoryError):
        error = UserError(f"out of memory: raise --grad-accum-steps, or lower --batch-size ({error})")
    kill_workers()
    if local_rank() == 0 or not isinstance(error, Stopped):  # all ranks raise Stopped
        time.sleep(local_rank())  # if a lower rank raises it, too, torchrun ends this process first
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr, flush=True)
    if dist.is_initialized():  # at once: leaving the group could wait for other ranks forever
        os._exit(error.status)
    sys.exit(error.status)


def kill_workers():
    """Kill the data workers of this process."""
    if hasattr(signal, "SIGCHLD"):  # Windows lacks it
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else the DataLoader reports them
    for process in multiprocessing.active_children():
        if process.daemon:  # others are not ours
            process.kill()


def cleanup():
    """Leave the process group, all ranks together: no rank exits while others still communicate. Ends the process."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # at once: threads of PyTorch's that outlive the group may abort while Python shuts down


def from_rank0(function: Callable, *args):
    """Call a function on rank 0 only and return its result on all ranks; all raise its UserError, or OSError as one."""
    result = [None, None]
    if rank() == 0:
        try:
            result[0] = function(*args)
        except UserError as error:
            result[1] = str(error)
        except OSError as error:
            result[1] = f"{error}: check permissions and free disk space"
    if dist.is_initialized():
        _wait_for(dist.broadcast_object_list, result)
    if result[1] is not None:
        raise UserError(result[1])
    return result[0]


def barrier():
    """Wait for all processes."""
    all_reduce_max(0)


def all_reduce_mean(value: Tensor) -> Tensor:
    """Mean over all processes."""
    if not dist.is_initialized():
        return value
    value = value.clone()
    _wait_for(dist.all_reduce, value)
    return value / world_size()


def all_gather(rows: Tensor) -> Tensor:
    """The rows (n ...) of all processes."""
    if not dist.is_initialized():
        return rows
    gathered = [None] * world_size()
    _wait_for(dist.all_gather_object, gathered, rows)
    return torch.cat(gathered)


def all_reduce_max(value: int) -> int:
    """Maximum over all processes of a Python number."""
    if not dist.is_initialized():
        return value
    maximum = torch.tensor(value)  # on the CPU: no CUDA synchronization
    _wait_for(dist.all_reduce, maximum, dist.ReduceOp.MAX)
    return int(maximum)


def _wait_for(collective: Callable, *args):
    """Communicate with all processes. Raises UserError if another one has ended or does not respond."""
    try:
        collective(*args)
    except RuntimeError as error:
        problem = "another process has failed or is not responding; see its error message, if there is one"
        raise UserError(f"{problem} ({error})") from error
