"""What a run folder holds, and how it is written so that a crash never leaves half a file.

config.json, provenance.json, metrics.jsonl (a line an epoch), last.pt (all that is needed to go on), best.pt and
snapshots/epoch_XXXX.pt (weights alone, ready for load_weights and the viewer).
"""

import dataclasses
import json
import os
import platform
import shlex
import sys
from pathlib import Path

import torch
import torchvision

from analysis import read_metrics
from convit_min import ConViT


def save(record: dict, file: Path):
    """torch.save that leaves either the old file or the whole new one, whatever happens meanwhile."""
    partial = file.with_suffix(".tmp")
    with open(partial, "wb") as stream:
        torch.save(record, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def save_weights(model: ConViT, classes: list[str], epoch: int, file: Path, half: bool = False):
    """Write a model so that the file opens by itself: weights (in half precision if asked), config, classes, epoch."""
    state = {key: value.half() if half else value for key, value in model.state_dict().items()}
    config = dataclasses.asdict(model.config)
    save({"model": state, "model_config": config, "classes": classes, "epoch": epoch}, file)


def save_last(run: Path, parts: dict, epoch: int, best: float):
    """Write last.pt: the state of every part (model, optimizer ...) and of the random numbers after this epoch."""
    record = {name: part.state_dict() for name, part in parts.items()}
    record |= {"rng": torch.get_rng_state(), "epoch": epoch, "best": best}
    if torch.cuda.is_available():
        record["cuda_rng"] = torch.cuda.get_rng_state()
    save(record, run / "last.pt")


def resume(run: Path, parts: dict, device: torch.device) -> tuple[int, float]:
    """Put all parts back as last.pt has them; return the epoch to go on with, and the best score so far.

    Raises FileNotFoundError or ValueError where there is no last.pt that fits.
    """
    file = run / "last.pt"
    if not file.exists():
        raise FileNotFoundError(f"{run} holds no run to go on with; leave out --resume to start one")
    try:
        record = torch.load(file, map_location=device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(record[name])
        torch.set_rng_state(record["rng"].cpu())
        if "cuda_rng" in record and torch.cuda.is_available():
            torch.cuda.set_rng_state(record["cuda_rng"].cpu())
    except Exception as error:  # damaged files make the unpickler raise nearly anything
        raise ValueError(f"{file} is damaged, or of a run with other settings") from error
    metrics = [line for line in read_metrics(run) if line["epoch"] <= record["epoch"]]  # a later one was cut off
    partial = run / "metrics.tmp"
    partial.write_text("".join(json.dumps(line) + "\n" for line in metrics))
    os.replace(partial, run / "metrics.jsonl")
    return record["epoch"] + 1, record["best"]


def snapshot_epochs(epochs: int, count: int = 16) -> set[int]:
    """Epochs of which to keep a snapshot: 0, 1 and the last, and up to count in all, about even on a log scale."""
    return {0} | {round(epochs ** (i / (count - 2))) for i in range(count - 1)}


def start_run(run: Path, device: torch.device):
    """Make a run folder, with its provenance.json. Raises ValueError where there is a run already."""
    if (run / "last.pt").exists():
        raise ValueError(f"{run} holds a run already: add --resume to go on with it, or choose another --run")
    (run / "snapshots").mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("")  # of a run cut off before its first last.pt
    (run / "provenance.json").write_text(json.dumps(provenance(device), indent=2) + "\n")


def write_config(run: Path, config: dict):
    """Write config.json, which --config and --resume read."""
    (run / "config.json").write_text(json.dumps(config, indent=2) + "\n")


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


def nested_list(tensor: torch.Tensor) -> list:
    """A tensor as JSON can hold it: rounded, and null for NaN."""
    if tensor.ndim > 0:
        return [nested_list(part) for part in tensor]
    return None if tensor.isnan() else round(tensor.item(), 4)
