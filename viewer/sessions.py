"""Training runs that users start on the page: train_cifar.py on synthetic patterns, one run at a time."""

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
EPOCHS = 7  # of 75 steps; gates and accuracy change most in epochs 3 and 4
RECIPE = ["--dataset", "patterns", "--steps-per-epoch", "75", "--batch-size", "32", "--crop-padding", "0",
          "--no-hflip", "--device", "cpu"]  # fmt: skip
MAX_KEPT_RUNS = 4  # finished runs, about 35 MB each
MAX_QUEUE_LENGTH = 20
CLIENT_TIMEOUT = 150  # seconds without a request; browsers wake background tabs once a minute


class TrainingQueue:
    """Sessions waiting to train; the first one trains in a subprocess. Every call to `handle` advances the queue."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="convit-viewer-"))
        self.queue: list[str] = []
        self.last_seen: dict[str, float] = {}  # monotonic time of a session's last request
        self.process: subprocess.Popen | None = None  # of the first session in the queue
        self.started = 0.0
        self.lock = RLock()

    def handle(self, session: str, action: str) -> dict:
        """Apply a session's action ("start", "stop" or "status") and return its status.

        The status has a `state`: "idle", "full", "waiting" (with `position`, the number of sessions ahead), "training"
        (with `seconds_left`, or None), "done" or "failed". "training" and "done" also have `epoch` and `epochs`.
        """
        run_dir = self.run_dir(session)
        with self.lock:
            if action == "start" and session not in self.queue:
                if len(self.queue) >= MAX_QUEUE_LENGTH:
                    return self._status(session) | {"state": "full"}  # keeps the session's earlier run
                if run_dir.exists():  # kept until the new run has finished an epoch
                    run_dir.rename(self._previous(run_dir))
                self.queue.append(session)
            elif action == "stop" and session in self.queue:
                self._remove(session)
            if session in self.queue:
                self.last_seen[session] = time.monotonic()
            self._advance_queue()
            return self._status(session)

    def run_dir(self, session: str) -> Path:
        """Run folder of a session. Raises ValueError for an invalid session id."""
        if not (isinstance(session, str) and session.isalnum() and len(session) <= 40):
            raise ValueError("a session id has up to 40 letters and digits")
        return self.folder / session

    def close(self):
        """Stop training and delete all runs."""
        with self.lock:
            self._stop_process()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _advance_queue(self):
        now = time.monotonic()
        for session in list(self.queue):
            if now - self.last_seen[session] > CLIENT_TIMEOUT:
                self._remove(session)
        if self.process and self.process.poll() is not None:
            self.process = None
            self._remove(self.queue[0])
        if self.queue and not self.process:
            self._start_process(self.run_dir(self.queue[0]))

    def _start_process(self, run_dir: Path):
        command = ["nice", sys.executable, SCRIPT, *RECIPE, "--epochs", str(EPOCHS), "--run", run_dir]
        env = os.environ | {"OMP_WAIT_POLICY": "passive"}  # idle threads leave the cores to the server
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self.started = time.time()
        self.process = subprocess.Popen(command, cwd=self.folder, env=env, **quiet)

    def _stop_process(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _remove(self, session: str):
        if session == self.queue[0]:
            self._stop_process()
        self.queue.remove(session)
        self.last_seen.pop(session, None)
        run_dir, previous = self.run_dir(session), self._previous(self.run_dir(session))
        if previous.exists() and self._count_records(run_dir) < 2:
            shutil.rmtree(run_dir, ignore_errors=True)
            previous.rename(run_dir)
        shutil.rmtree(previous, ignore_errors=True)
        finished = [run for run in self.folder.iterdir() if run.stem not in self.queue]
        for run in sorted(finished, key=lambda run: run.stat().st_mtime)[:-MAX_KEPT_RUNS]:
            shutil.rmtree(run, ignore_errors=True)

    def _status(self, session: str) -> dict:
        if session in self.queue[1:]:
            return {"state": "waiting", "position": self.queue.index(session)}
        run_dir = self.run_dir(session)
        records = self._count_records(run_dir)
        progress = {"epoch": records - 1, "epochs": EPOCHS}
        if session in self.queue:
            return {"state": "training", "seconds_left": self._seconds_left(run_dir, records)} | progress
        if records == 0:
            return {"state": "failed" if run_dir.exists() else "idle"}
        return {"state": "done"} | progress

    @staticmethod
    def _previous(run_dir: Path) -> Path:
        return run_dir.with_suffix(".previous")

    @staticmethod
    def _count_records(run_dir: Path) -> int:
        """Finished epochs, and epoch 0 before training."""
        return len(read_metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0

    def _seconds_left(self, run_dir: Path, records: int) -> int | None:
        if records < 2:
            return None  # startup takes longer than an epoch
        last_epoch = (run_dir / "metrics.jsonl").stat().st_mtime
        left = (last_epoch - self.started) / records * (EPOCHS + 1 - records) - (time.time() - last_epoch)
        return max(round(left), 0)
