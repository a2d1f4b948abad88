"""Training runs that visitors of the page start: train_cifar.py on generated patterns, one at a time, others wait."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import RLock

from analysis import read_metrics

SCRIPT = Path(__file__).parent.parent / "train_cifar.py"
EPOCHS = 7  # of 75 steps; the heads turn, and the patterns are learned, in the third and the fourth
RECIPE = ["--dataset", "patterns", "--epoch-steps", "75", "--batch-size", "32", "--shift", "0", "--no-flip"]
KEPT = 4  # finished runs; about 35 MB each
LONGEST_LINE = 20
PATIENCE = 150  # seconds without a word from a visitor; browsers wake pages in the background once a minute


class Trainer:
    """A line of visitors, of whom the first has a training process. Ask it every second or so: it moves when asked."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="convit-page-"))
        self.line: list[str] = []
        self.heard: dict[str, float] = {}  # when a visitor last asked
        self.process: subprocess.Popen | None = None  # of the first in line
        self.started = 0.0
        self.lock = RLock()

    def ask(self, visitor: str, wish: str) -> dict:
        """Take a visitor's wish to "start", "look" or "stop", and tell how it stands for them.

        `state` is "idle", "full", "waiting" (with their `place`), "training", "done" or "failed"; from "training" on
        with `epoch`, `epochs` and the `seconds` that are left, about.
        """
        run = self.run(visitor)
        with self.lock:
            if wish == "start" and visitor not in self.line:
                if len(self.line) >= LONGEST_LINE:
                    return self._standing(visitor) | {"state": "full"}  # an earlier run of theirs is still there
                shutil.rmtree(run, ignore_errors=True)
                self.line.append(visitor)
            elif wish == "stop" and visitor in self.line:
                self._leave(visitor)
            if visitor in self.line:
                self.heard[visitor] = time.monotonic()
            self._move()
            return self._standing(visitor)

    def run(self, visitor: str) -> Path:
        """The run folder of a visitor. Raises ValueError for what is no name."""
        if not (isinstance(visitor, str) and visitor.isalnum() and len(visitor) <= 40):
            raise ValueError("a visitor has a short name of letters and digits")
        return self.folder / visitor

    def close(self):
        """End what runs, and remove all runs."""
        with self.lock:
            self._end_process()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _move(self):
        now = time.monotonic()
        for visitor in [other for other in self.line if now - self.heard[other] > PATIENCE]:
            self._leave(visitor)
        if self.process and self.process.poll() is not None:
            self.process = None
            self._leave(self.line[0])
        if self.line and not self.process:
            run = self.run(self.line[0])
            command = ["nice", sys.executable, SCRIPT, *RECIPE, "--epochs", str(EPOCHS), "--run", run]
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            polite = os.environ | {"OMP_WAIT_POLICY": "passive"}  # threads that wait leave the cores to the page
            self.process, self.started = subprocess.Popen(command, cwd=self.folder, env=polite, **quiet), time.time()

    def _leave(self, visitor: str):
        if visitor == self.line[0]:
            self._end_process()
        self.line.remove(visitor)
        self.heard.pop(visitor, None)
        self._forget_old()

    def _end_process(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _forget_old(self):
        ended = [run for run in self.folder.iterdir() if run.name not in self.line]
        for run in sorted(ended, key=lambda run: run.stat().st_mtime)[:-KEPT]:
            shutil.rmtree(run, ignore_errors=True)

    def _standing(self, visitor: str) -> dict:
        if visitor in self.line[1:]:
            return {"state": "waiting", "place": self.line.index(visitor)}
        run = self.run(visitor)
        metrics = run / "metrics.jsonl"
        done = len(read_metrics(run)) if metrics.exists() else 0  # the first line is of epoch 0, before training
        progress = {"epoch": done - 1, "epochs": EPOCHS}
        if visitor in self.line:
            return {"state": "training", "seconds": self._seconds_left(metrics, done)} | progress
        if done == 0:
            return {"state": "failed" if run.exists() else "idle"}
        return {"state": "done"} | progress

    def _seconds_left(self, metrics: Path, done: int) -> int | None:
        if done < 2:
            return None  # starting took longer than an epoch will
        written = metrics.stat().st_mtime
        left = (written - self.started) / done * (EPOCHS + 1 - done) - (time.time() - written)
        return max(round(left), 0)
