"""Files of a run folder, written so that a crash never leaves half a file."""

import contextlib
import dataclasses
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from convit_min import ConViT
from training.distributed import UserError, world_size


def write(file: Path, write_to: Callable[[BinaryIO], object]):
    """Write a file atomically: whatever happens, it is either the old or the new one. Raises UserError."""
    new = file.with_suffix(".tmp")
    try:
        with open(new, "wb") as output:
            write_to(output)
            output.flush()
            os.fsync(output.fileno())
        os.replace(new, file)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
        with contextlib.suppress(OSError):
            new.unlink()
        advice = "free disk space or check permissions, then rerun (with --resume if the run has a last.pt)"
        raise UserError(f"{file} cannot be saved ({error}): {advice}") from error


def load(file: Path) -> dict:
    """torch.load of a checkpoint, to the CPU, after verifying its checksums. Raises UserError if that fails."""
    if not file.exists():
        raise UserError(f"{file.parent} contains no run to resume; omit --resume to start one")
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip():  # torch.load does not verify checksums
                raise ValueError("wrong checksum")
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except Exception as error:  # unpickling a damaged file raises nearly any exception
        advice = f"to restart from the best weights, use --weights {file.with_name('best.pt')} and another --run"
        raise UserError(f"{file} is damaged, or not from this script, and was not loaded; {advice}") from error


def save_weights(model: ConViT, classes: list[str], crop_pct: float, epoch: int, file: Path, half: bool = False):
    """Write weights (in half precision if `half`) with everything that `weights.open_model` needs."""
    state = {key: (value.half() if half else value).cpu() for key, value in model.state_dict().items()}
    record = {"model": state, "epoch": epoch} | model_metadata(model, classes, crop_pct)
    write(file, partial(torch.save, record))


def model_metadata(model: ConViT, classes: list[str], crop_pct: float) -> dict:
    """What `weights.open_model` needs in addition to the weights."""
    # by way of JSON: torch.load(weights_only=True) refuses the NumPy numbers that a config may have
    config = json.loads(json.dumps(dataclasses.asdict(model.config), default=lambda number: number.item()))
    return {"model_config": config, "classes": classes, "crop_pct": crop_pct}


def write_text(file: Path, text: str):
    """Write a text file atomically."""
    write(file, lambda output: output.write(text.encode()))


def write_json(file: Path, value):
    """Write a JSON file atomically."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def snapshot_epochs(epochs: int, count: int = 16) -> set[int]:
    """Epochs to keep a snapshot of: `count` of them, with 0, 1, and the last, evenly spaced on a logarithmic scale."""
    selected = [0, 1]
    while len(selected) < min(count, epochs + 1):
        last, remaining = selected[-1], count - len(selected)
        selected.append(max(last + 1, round(last * (epochs / last) ** (1 / remaining))))
    return set(selected)


def provenance(device: torch.device) -> dict:
    """How a result is produced: command, commit, current time, hardware, and versions."""
    amx = ", AMX" if torch.cpu.get_capabilities().get("amx_tile") else ""  # bf16 is fast only with it
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # set by python -m PACKAGE.MODULE
    program = f"-m {spec.name}" if spec else Path(sys.argv[0]).name
    entry = {
        "command": f"python {program} {shlex.join(sys.argv[1:])}".strip(),
        "commit": git_commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": f"CPU, {torch.get_num_threads()} threads",
        "processes": world_size(),
        "cpu": _search(r"model name\s*: (.*)", "/proc/cpuinfo") or platform.processor(),  # not Linux, or not x86
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}{amx}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
    }
    if device.type == "cuda":
        entry |= {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _search(r"(\d+\.\d+(?:\.\d+)?)", "/proc/driver/nvidia/version"),
        }
    return entry


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" appended if tracked files were modified; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _search(pattern: str, file: str) -> str | None:
    """The first group of a pattern in a file; None if the file or the pattern is missing."""
    try:
        match = re.search(pattern, Path(file).read_text())
    except OSError:
        return None
    return match and match[1]


def to_json_list(tensor: torch.Tensor) -> list:
    """A tensor as JSON can represent it: rounded to four digits, null for NaN."""
    values = tensor.double().cpu().numpy().round(4)
    return np.where(np.isnan(values), None, values).tolist()
