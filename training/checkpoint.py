"""The run folder: config.json, provenance.json, metrics.jsonl, last.pt, best.pt and snapshots/, none ever half-written."""

import dataclasses
import json
import os
import platform
import shlex
import sys
from pathlib import Path

import torch
import torchvision

from convit_min import ConViT


def save(record: dict, file: Path):
    """torch.save that leaves either the old file or the whole new one, whatever happens meanwhile."""
    partial = file.with_suffix(".tmp")
    with open(partial, "wb") as stream:
        torch.save(record, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def model_record(model: ConViT, classes: list[str], epoch: int, half: bool = False) -> dict:
    """What a file of weights needs to be opened by itself: weights, config, class names, epoch."""
    state = {key: value.half() if half else value for key, value in model.state_dict().items()}
    return {"model": state, "model_config": dataclasses.asdict(model.config), "classes": classes, "epoch": epoch}


def snapshot_epochs(epochs: int, count: int = 16) -> set[int]:
    """Epochs at which to keep a snapshot: 0, 1 and the last, and between them about evenly on a log scale."""
    return {0} | {round(epochs ** (i / max(count - 2, 1))) for i in range(count - 1)}


def start_run(run: Path, config: dict, device: torch.device):
    """Make a run folder with its config.json and provenance.json. Raises ValueError where there is a run already."""
    if (run / "metrics.jsonl").exists() or (run / "last.pt").exists():
        raise ValueError(f"{run} holds a run already: add --resume to go on with it, or choose another --run")
    (run / "snapshots").mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (run / "provenance.json").write_text(json.dumps(provenance(device), indent=2) + "\n")


def provenance(device: torch.device) -> dict:
    """How a result was made: command, hardware, versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "command": shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": name,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def append_metrics(run: Path, line: dict):
    """Add a line to metrics.jsonl."""
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps(line) + "\n")


def read_metrics(run: Path) -> list[dict]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def nested_list(tensor: torch.Tensor) -> list:
    """A tensor as JSON can hold it: rounded, and null for NaN."""
    if tensor.ndim > 0:
        return [nested_list(part) for part in tensor]
    return None if tensor.isnan() else round(tensor.item(), 4)
