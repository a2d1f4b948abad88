"""Train a sweep: many runs of train_cifar.py, each in its own process, with the finished ones in one JSONL file.

A finished run is one line of runs.jsonl: name, config, provenance, and metrics. It is not trained again. An unfinished
run is a folder in a work folder; rerunning the command resumes it. Several processes can train the same sweep at once,
since a run is locked while it trains.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from analysis import read_metrics
from training.distributed import Stopped, UserError, abort

CODE = Path(__file__).parent.parent
WORK = Path("runs/sweeps")
RESUME_HINT = "rerun the same command to resume"
LOCATION_FLAGS = {"run", "data_dir", "device", "workers"}  # where a run is trained, not what it trains


@dataclass(frozen=True)
class RunSpec:
    """A run of a sweep."""

    name: str  # unique within the sweep
    flags: list[str]  # of train_cifar.py, except for --run and --resume
    config: dict = field(default_factory=dict)  # values that its config.json must have; None matches any value
    definition: str = ""  # whatever else defines the run, such as a diff of the code


def read_run(folder: Path) -> dict:
    """A run folder as a record: name, config, provenance, and metrics."""
    config, provenance = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "provenance"))
    return {"name": folder.name, "config": config, "provenance": provenance, "metrics": read_metrics(folder)}


class Sweep:
    """Finished runs in `file`, unfinished ones in folders in `work`; `read` makes a record of a finished folder."""

    def __init__(self, file: Path, work: Path, read: Callable[[Path], dict] = read_run):
        self.file, self.work, self.read = file, work, read
        self.start_time, self.num_trained = time.monotonic(), 0

    def records(self) -> dict[str, dict]:
        """All finished runs by name. An incomplete last line, left by a crash, is ignored."""
        lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return {record["name"]: record for record in records}

    def append(self, record: dict):
        """Add a finished run to the file unless it is there. Atomic among processes."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if record["name"] not in self.records():
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
                file.write(json.dumps(record).encode() + b"\n")

    def missing(self, runs: list[RunSpec]) -> list[RunSpec]:
        """The unfinished runs. Raises UserError if a finished run of the same name has a different config."""
        records = self.records()
        for run in runs:
            if run.name in records:
                _check(run, records[run.name], f"delete its line in {self.file}")
        return [run for run in runs if run.name not in records]

    def train_next(
        self, runs: list[RunSpec], prepare: Callable[[RunSpec], Path] = lambda run: CODE, cwd: Path | None = None
    ) -> bool:
        """Train the first missing run that no other process trains; return False if no run is missing.

        `prepare` returns the code folder that trains a run; paths in the run's flags are relative to `cwd`.
        Raises UserError if the run fails, and once it is saved after a KeyboardInterrupt.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        if not (missing := self.missing(runs)):
            return False
        run, lock = self._lock_one(missing)
        try:
            if self.missing([run]):  # no other process has finished it meanwhile
                print(f"\n{run.name} ({len(missing)} of {len(runs)} runs left)", flush=True)
                accuracy = self._train(run, prepare(run), cwd, lock)["metrics"][-1]["test_accuracy"]
                self.num_trained += 1
                minutes = (time.monotonic() - self.start_time) / 60
                left = minutes / self.num_trained * (len(missing) - 1)
                print(f"{accuracy:.1f}% after {minutes:.1f} minutes; about {left:.0f} minutes left", flush=True)
        finally:
            os.close(lock)
        return True

    def _lock_one(self, runs: list[RunSpec]) -> tuple[RunSpec, int]:
        """Lock the first run that no other process trains; if there is none, wait for the first of all."""
        for operation, candidates in ((fcntl.LOCK_EX | fcntl.LOCK_NB, runs), (fcntl.LOCK_EX, runs[:1])):
            for run in candidates:
                lock = os.open(self.work / f"{run.name}.lock", os.O_RDWR | os.O_CREAT)
                try:
                    fcntl.flock(lock, operation)
                    return run, lock
                except BlockingIOError:
                    os.close(lock)
            print(f"waiting for {runs[0].name}, which another process trains", flush=True)

    def _train(self, run: RunSpec, code: Path, cwd: Path | None, lock: int) -> dict:
        """Train or resume a run, append it to the file and return its record."""
        folder, definition = self.work / run.name, self.work / run.name / "definition.txt"
        resume = ["--resume"] if (folder / "last.pt").exists() else []
        if resume:
            saved = {"config": json.loads((folder / "config.json").read_text())}
            saved["definition"] = definition.read_text() if definition.exists() else ""
            _check(run, saved, f"delete {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        definition.write_text(run.definition)
        run_flags = [*run.flags, "--run", os.path.relpath(folder, cwd or "."), *resume]
        command = [sys.executable, str(code.resolve() / "train_cifar.py"), *run_flags]
        # In its own session, the child gets a Ctrl-C only once, from here. It inherits the lock, and so keeps it even
        # if this process is killed.
        process = subprocess.Popen(command, cwd=cwd, start_new_session=True, pass_fds=[lock])
        interrupted = False
        try:
            process.wait()
        except KeyboardInterrupt:
            interrupted = True
            process.terminate()  # it finishes the step and saves
            process.wait()
        if process.returncode == 0:
            record = self.read(folder) | ({"definition": run.definition} if run.definition else {})
            self.append(record)
        if interrupted:
            raise Stopped(f"stopped in the run {run.name}; {RESUME_HINT}", 130)
        if process.returncode:
            raise UserError(f"the run {run.name} failed; fix the cause, then {RESUME_HINT}")
        return record


def _check(run: RunSpec, record: dict, remedy: str):
    """Raise UserError if a stored run was trained with a different config or definition."""
    for name, value in run.config.items():
        saved = record["config"].get(name)
        if name not in LOCATION_FLAGS and value not in (None, saved):
            flag_name = "--" + name.replace("_", "-")
            raise UserError(f"{run.name} has {flag_name} {saved}, not {value}; {remedy} to train it again")
    if run.definition != record.get("definition", ""):
        raise UserError(f"{run.name} was trained with different flags or a different diff; {remedy} to train it again")


def run_main(function: Callable, *args):
    """Call a function; on a UserError, SIGINT or SIGTERM, end the process with one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        function(*args)
    except UserError as error:
        abort(error)
    except KeyboardInterrupt:
        abort(Stopped("stopped", 130))
