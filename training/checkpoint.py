"""What a run folder holds, and how it is written so that a crash never leaves half a file.

config.json, provenance.json, metrics.jsonl (a line an epoch), last.pt (all that is needed to go on), best.pt and
snapshots/epoch_XXXX.pt (weights alone, ready for load_weights and the viewer).
"""

import dataclasses
import fcntl
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import zipfile
from datetime import datetime, timezone
from pathlib import Path

import torch
import torchvision

from analysis import read_metrics
from convit_min import ConViT
from training import distributed
from training.config import RunConfig, same_run

START_TIME = datetime.now(timezone.utc)


def save(record: dict, file: Path):
    """torch.save that leaves either the old file or the whole new one, whatever happens meanwhile.

    Raises OSError where there is no room, or no right, to write.
    """
    partial = file.with_suffix(".tmp")
    try:
        with open(partial, "wb") as stream:
            torch.save(record, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        partial.unlink(missing_ok=True)
        raise OSError(
            f"{file} cannot be saved ({error}); what was saved before is whole: see that there is room, and --resume"
        ) from error


def save_weights(model: ConViT, classes: list[str], epoch: int, file: Path, half: bool = False):
    """Write a model so that the file opens by itself: weights (in half precision if asked), config, classes, epoch."""
    state = {key: (value.half() if half else value).cpu() for key, value in model.state_dict().items()}
    config = dataclasses.asdict(model.config)
    save({"model": state, "model_config": config, "classes": classes, "epoch": epoch}, file)


def begin(run: Path, parts: dict, config: RunConfig, device: torch.device, count: int) -> dict:
    """Start a run on `count` pictures or go on with it; return where it stands.

    That is the epoch, the steps done in it (index), their summed loss, the best accuracy so far, and the count.

    Where torchrun has started again after a process had died, its own run is gone on with unasked. The folder is locked
    until the process ends. Raises ValueError or OSError where a run can be neither begun nor resumed.
    """
    resumed, history, problem, restarted = config.resume, [], "", distributed.restarted()
    if distributed.rank() == 0:
        try:
            resumed, history = claim(run, config.resume, restarted)
        except (ValueError, OSError) as error:
            problem = str(error)
    if distributed.largest(len(problem)):  # then all processes end, and none waits for another
        raise ValueError(problem or "the first process cannot begin the run")
    resumed = bool(distributed.largest(resumed))
    state = {"epoch": 0, "index": 0, "loss_sum": 0.0, "best": -1.0, "count": count}
    if resumed:
        state = resume(run, parts, config, device)
        if state["count"] != count:
            pictures = f"{count} training pictures where {run} began with {state['count']}"
            raise ValueError(
                f"there are {pictures}: put them back, or choose another --run with --weights {run}/best.pt"
            )
    if distributed.rank() == 0:
        entry = provenance(device) | {"job": distributed.job()}
        metrics = [line for line in read_metrics(run) if line["epoch"] < state["epoch"]] if resumed else []
        write(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in metrics))
        write(run / "provenance.json", json.dumps([*history, entry], indent=2) + "\n")
        write(run / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    distributed.wait()
    return state


def claim(run: Path, resumed: bool, restarted: bool) -> tuple[bool, list[dict]]:
    """Lock a run folder; return whether to go on with the run in it, and that run's provenance.

    Raises ValueError where there is a run that is not to be gone on with.
    """
    file, history = run / "provenance.json", []
    if (run / "last.pt").exists():
        history = json.loads(file.read_text()) if file.exists() else []
        resumed = resumed or (restarted and distributed.job() in [entry["job"] for entry in history])
        if not resumed:
            raise ValueError(f"{run} holds a run already: add --resume to go on with it, or choose another --run")
    lock(run)
    return resumed, history


def lock(run: Path):
    """Make the run folder this process's own, until it ends. Raises ValueError where it is another's."""
    (run / "snapshots").mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT)  # never closed: the lock goes with the process
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone, not of those that it forks
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(f"another process is training into {run}: wait for it, or choose another --run") from error


def write(file: Path, text: str):
    """Write a text file so that either the old one is there or the whole new one."""
    partial = file.with_suffix(".tmp")
    partial.write_text(text)
    os.replace(partial, file)


def save_last(run: Path, parts: dict, config: RunConfig, state: dict):
    """Write last.pt, once for all processes: every part (model, optimizer ...), the flags, and where the run stands.

    Random numbers are no part of it: every draw follows from the seed, the step and the process.
    """
    if distributed.rank() > 0:
        return
    record = {name: part.state_dict() for name, part in parts.items()}
    save(record | {"config": dataclasses.asdict(config), "state": state}, run / "last.pt")


def require_finite(loss: float, run: Path, step: int, rate: float):
    """End the run where its loss is no longer a number."""
    if not math.isfinite(loss):
        last = f"{run / 'last.pt'} is from before" if (run / "last.pt").exists() else "nothing was saved before"
        advice = f"start again with a lower --lr and another --run ({last})"
        distributed.leave(f"the loss is no longer finite at step {step}, learning rate {rate:.2g}: {advice}")


def resume(run: Path, parts: dict, config: RunConfig, device: torch.device) -> dict:
    """Put all parts back as last.pt has them; return where the run stands.

    Raises FileNotFoundError or ValueError where there is no last.pt that is whole and of this run.
    """
    file = run / "last.pt"
    if not file.exists():
        raise FileNotFoundError(f"{run} holds no run to go on with; leave out --resume to start one")
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip():  # every part against its checksum, which torch.load does not look at
                raise ValueError("a checksum is wrong")
        record = torch.load(file, map_location=device, weights_only=True)
        saved_config, state = record["config"], record["state"]
    except Exception as error:  # damaged files make the unpickler raise nearly anything
        found = "is damaged, or was not written by this script, and was not opened further"
        instead = f"to start again from the best weights, --weights {run / 'best.pt'} and another --run"
        raise ValueError(f"{file} {found}; {instead}") from error
    same_run(config, saved_config)
    try:
        for name, part in parts.items():
            part.load_state_dict(record[name])
    except (RuntimeError, KeyError) as error:  # another number of classes, for one
        raise ValueError(f"{file} does not fit this model and data: {error}") from error
    return state


def snapshot_epochs(epochs: int, count: int = 16) -> set[int]:
    """Epochs of which to keep a snapshot: count of them, 0, 1 and the last among them, about even on a log scale."""
    chosen = [0, 1]
    while len(chosen) < min(count, epochs + 1):
        last, left = chosen[-1], count - len(chosen)
        chosen.append(max(last + 1, round(last * (epochs / last) ** (1 / left))))
    return set(chosen)


def provenance(device: torch.device) -> dict:
    """How a result was made: command, commit, start time, hardware, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": git_commit(),
        "started": START_TIME.isoformat(timespec="seconds"),
        "device": name,
        "cpu": cpu_model(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" after it if tracked files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        return None


def cpu_model() -> str:
    """The processor's name."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or not x86
        return platform.processor()


def record_cost(run: Path, images_per_second: float):
    """Add to provenance.json the wall-clock time of this process so far, and its training speed in the last epoch."""
    file = run / "provenance.json"
    *earlier, entry = json.loads(file.read_text())
    wall_clock = datetime.now(timezone.utc) - START_TIME
    entry |= {"wall_clock_s": round(wall_clock.total_seconds()), "images_per_second": round(images_per_second)}
    write(file, json.dumps([*earlier, entry], indent=2) + "\n")


def append_metrics(run: Path, line: dict):
    """Add a line to metrics.jsonl."""
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps(line) + "\n")


def nested_list(tensor: torch.Tensor) -> list:
    """A tensor as JSON can hold it: rounded, and null for NaN."""
    if tensor.ndim > 0:
        return [nested_list(part) for part in tensor]
    return None if tensor.isnan() else round(tensor.item(), 4)
