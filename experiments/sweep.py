"""Train a sweep: many runs of train_cifar.py, each in its own process and folder.

A finished run is also a line of runs.jsonl, with its name, config, provenance, and metrics, and is not trained again.
Rerunning the command resumes an unfinished one. Several processes can train the same sweep at once, since a run is
locked while it trains.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from analysis import read_json_lines, read_metrics
from training.distributed import Stopped, UserError, abort

CODE = Path(__file__).parent.parent
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # exit statuses of a training after a signal
RESUME_HINT = "rerun the same command to resume"
Plan = dict[str, list[str]]  # name: flags of train_cifar.py, without --run and --resume; none: it waits for other runs


def read_run(folder: Path) -> dict:
    """A run folder as a record: name, config, provenance, and metrics."""
    config, provenance = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "provenance"))
    return {"name": folder.name, "config": config, "provenance": provenance, "metrics": read_metrics(folder)}


def read_runs(file: Path) -> dict[str, dict]:
    """The finished runs in a runs.jsonl as records by name; none if there is no such file. Raises UserError."""
    try:
        return {record["name"]: record for record in read_json_lines(file)} if file.exists() else {}
    except ValueError as error:  # such as a merge conflict
        raise UserError(str(error)) from error


def append_run(file: Path, record: dict):
    """Add a finished run to a runs.jsonl unless it is there. Atomic among processes."""
    with open(file, "a+b") as runs:
        lock(runs.fileno())
        if record["name"] not in read_runs(file):
            runs.seek(0)
            runs.truncate(runs.read().rfind(b"\n") + 1)
            runs.write(json.dumps(record).encode() + b"\n")


def train_sweep(folder: Path, get_plan: Callable[[dict], Plan], prepare: Callable[[str], Path] = lambda name: CODE):
    """Train all missing runs of a plan in subfolders; it is made again, from the finished runs, after every run.

    `prepare` returns the code folder that trains a run. Raises UserError if a run fails, at once if it could not start
    and otherwise after all others; Stopped, once the run is saved, if a signal ended this process or the training.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed = []
    while True:
        finished = read_runs(folder / "runs.jsonl")
        done = {*finished, *failed}
        missing = {name: flags for name, flags in get_plan(finished).items() if flags and name not in done}
        if not missing:
            break
        name, run_lock = lock_one(folder, list(missing))
        try:
            if name not in read_runs(folder / "runs.jsonl"):  # no other process has finished it meanwhile
                print(f"\n{name} ({len(missing)} runs left)", flush=True)
                train_run(folder / name, missing[name], prepare(name), run_lock)
        except UserError as error:  # if it has diverged, others may still succeed
            if isinstance(error, Stopped) or not (folder / name / "last.pt").exists():
                raise
            print(error, flush=True)
            failed.append(name)
        finally:
            os.close(run_lock)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; fix the cause, then {RESUME_HINT}")


def lock_one(folder: Path, names: list[str]) -> tuple[str, int]:
    """Lock the first run that no other process trains; if there is none, wait for the first of all."""
    for wait, candidates in ((False, names), (True, names[:1])):
        for name in candidates:
            run_lock = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT)
            try:
                lock(run_lock, wait)
                return name, run_lock
            except BlockingIOError:
                os.close(run_lock)
        print(f"waiting for {names[0]}, which another process trains", flush=True)


def train_run(folder: Path, flags: list[str], code: Path, run_lock: int):
    """Train or resume a run and append it to runs.jsonl."""
    resume = ["--resume"] if (folder / "last.pt").exists() else []
    command = [sys.executable, str(code.resolve() / "train_cifar.py"), *flags, "--run", str(folder), *resume]
    # In its own session, the child gets a Ctrl-C only once, from here. It inherits the lock, and so keeps it even if
    # this process is killed.
    process = subprocess.Popen(command, start_new_session=True, pass_fds=[run_lock])
    interrupted = False
    try:
        process.wait()
    except KeyboardInterrupt:
        interrupted = True
        process.terminate()  # it finishes the step and saves
        process.wait()
    if process.returncode == 0:
        append_run(folder.parent / "runs.jsonl", read_run(folder))
    if interrupted or process.returncode in STOPPED:
        raise Stopped(f"stopped in the run {folder.name}; {RESUME_HINT}", 130)
    if process.returncode:
        raise UserError(f"the run {folder.name} failed; fix the cause, then {RESUME_HINT}")


def lock(descriptor: int, wait: bool = True):
    """Lock an open file until it is closed. Raises BlockingIOError instead of waiting for another process."""
    try:
        import fcntl
    except ImportError as error:
        raise UserError("training needs Linux or macOS; on Windows, use WSL") from error
    fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def run_main(function: Callable, **flags):
    """Call a function; on a UserError, SIGINT or SIGTERM, end the process with one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        function(**flags)
    except UserError as error:
        abort(error)
    except KeyboardInterrupt:
        abort(Stopped("stopped", 130))
