"""Files of a run folder, written so that a crash never leaves half a file."""

import dataclasses
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import zipfile
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from convit_min import ConViT
from training.distributed import UserError, world_size


def save(record: dict, file: Path):
    """torch.save, atomically: whatever happens, the file is either the old or the new one.

    Raises UserError if the disk is full or not writable.
    """
    partial = file.with_suffix(".tmp")
    try:
        with open(partial, "wb") as output:
            torch.save(record, output)
            output.flush()
            os.fsync(output.fileno())
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError if the disk is full
        partial.unlink(missing_ok=True)
        advice = f"free disk space, then {rerun(file.parent)}"
        intact = "the previous one is intact; " if file.exists() else ""
        raise UserError(f"{file} cannot be saved ({error}): {intact}{advice}") from error


def rerun(run_dir: Path) -> str:
    """How to continue a run after a failure."""
    return "rerun with --resume" if (run_dir / "last.pt").exists() else "rerun"


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
        raise UserError(
            f"{file} is damaged, or was not written by this script, and was not loaded; to restart from the best "
            f"weights, use --weights {file.with_name('best.pt')} and another --run"
        ) from error


def save_weights(model: ConViT, classes: list[str], crop_pct: float, epoch: int, file: Path, half: bool = False):
    """Write weights (in half precision if `half`) with everything that `weights.open_model` needs."""
    state = {key: (value.half() if half else value).cpu() for key, value in model.state_dict().items()}
    save({"model": state, "epoch": epoch} | model_metadata(model, classes, crop_pct), file)


def model_metadata(model: ConViT, classes: list[str], crop_pct: float) -> dict:
    """What `weights.open_model` needs in addition to the weights."""
    # by way of JSON: torch.load(weights_only=True) refuses the NumPy numbers that a config may have
    config = json.loads(json.dumps(dataclasses.asdict(model.config), default=lambda number: number.item()))
    return {"model_config": config, "classes": classes, "crop_pct": crop_pct}


def write_text(file: Path, text: str):
    """Write a text file atomically."""
    partial = file.with_suffix(".tmp")
    partial.write_text(text)
    os.replace(partial, file)


def snapshot_epochs(epochs: int, count: int = 16) -> set[int]:
    """Epochs to keep a snapshot of: `count` of them, with 0, 1, and the last, evenly spaced on a logarithmic scale."""
    selected = [0, 1]
    while len(selected) < min(count, epochs + 1):
        last, remaining = selected[-1], count - len(selected)
        selected.append(max(last + 1, round(last * (epochs / last) ** (1 / remaining))))
    return set(selected)


def provenance(device: torch.device) -> dict:
    """How a result is produced: command, commit, current time, hardware, and versions."""
    name, gpu = f"CPU, {torch.get_num_threads()} threads", {}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        gpu = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": nvidia_driver()}
    script = Path(sys.argv[0])
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # set by python -m PACKAGE.MODULE
    program = f"-m {spec.name}" if spec else script.name
    return {
        "command": f"python {program} {shlex.join(sys.argv[1:])}".strip(),
        "commit": git_commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": name,
        "processes": world_size(),
        "cpu": cpu_model(),
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
    } | gpu


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" appended if tracked files were modified; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver."""
    try:
        version = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    return re.search(r"\d+\.\d+(\.\d+)?", version)[0]


def cpu_model() -> str:
    """The name of the processor."""
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or not x86
        return platform.processor()


def record_duration(run_dir: Path, seconds: float, images_per_second: float):
    """Add the wall-clock time of a run so far, and the speed of its last epoch, to provenance.json."""
    file = run_dir / "provenance.json"
    *earlier, entry = json.loads(file.read_text())
    entry |= {"wall_clock_s": round(seconds), "images_per_second": round(images_per_second)}
    write_text(file, json.dumps([*earlier, entry], indent=2) + "\n")


def to_json_list(tensor: torch.Tensor) -> list:
    """A tensor as JSON can represent it: rounded to four digits, null for NaN."""

    def convert(value):
        if isinstance(value, list):
            return [convert(item) for item in value]
        return None if value != value else round(value, 4)

    return convert(tensor.tolist())
