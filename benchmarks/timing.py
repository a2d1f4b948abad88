"""What the benchmarks share: command-line options, the timer and the format of results."""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

MIN_SECONDS = 0.02  # per timing, so that a short function is called several times


def benchmark_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser for `python -m benchmarks.NAME` with the option --out."""
    prog, formatter = f"python -m benchmarks.{name}", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=formatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"), help="default: %(default)s")
    return parser


def time_calls(function: Callable[[], object], calls: int = 1) -> float:
    """Seconds per call. If CUDA is in use, one synchronization follows the last call."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def time_interleaved(functions: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median seconds per call of each function over `repetitions` timings.

    The functions take turns, so that a slowdown of the machine affects all of them. Each is first called twice to warm
    up; the second call sets how many calls make a timing of MIN_SECONDS.
    """
    calls = {}
    for name, function in functions.items():
        time_calls(function)
        calls[name] = math.ceil(MIN_SECONDS / time_calls(function))
    turns = [{name: time_calls(functions[name], calls[name]) for name in functions} for _ in range(repetitions)]
    return {name: statistics.median(seconds[name] for seconds in turns) for name in functions}


def write_results(folder: Path, name: str, header: dict, markdown: str, results: dict):
    """Write `folder`/NAME.md and NAME.json, both with the header, and print the Markdown."""
    markdown = ", ".join(f"{key}: {value}" for key, value in header.items()) + "\n\n" + markdown
    print(markdown)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(markdown)
    (folder / f"{name}.json").write_text(json.dumps({"header": header} | results, indent=1) + "\n")
    print(f"Results are in {folder / name}.md and .json")
