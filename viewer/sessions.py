"""Training runs that users start on the page: train_cifar.py on synthetic patterns, one run at a time."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import RLock

from viewer.inspector import read_records

SCRIPT = Path(__file__).parent.parent / "train_cifar.py"
EPOCHS = 7  # of 75 steps; gates and accuracy change most in epochs 3 and 4
RECIPE = ["--dataset", "patterns", "--steps-per-epoch", "75", "--batch-size", "32", "--crop-padding", "0",
          "--no-hflip", "--device", "cpu"]  # fmt: skip
MAX_KEPT_RUNS = 4  # finished runs, about 35 MB each
MAX_QUEUE_LENGTH = 20
ERRORS = "errors.txt"  # of the run in progress
CLIENT_TIMEOUT = 150  # seconds without a request; browsers wake background tabs once a minute


class TrainingQueue:
    """Sessions waiting to train; the first one trains in a subprocess. Every call to `handle` advances the queue."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="convit-viewer-"))
        self.queue: list[str] = []
        self.last_seen: dict[str, float] = {}  # monotonic time of a session's last request
        self.run_dirs: dict[str, Path] = {}  # the run of every session that has trained, the latest start last
        self.process: subprocess.Popen | None = None  # of the first session in the queue
        self.earlier_run: Path | None = None  # of that session, until the new one has finished an epoch
        self.failed: set[str] = set()  # sessions whose last run has crashed, or could not start
        self.started = 0.0
        self.lock = RLock()

    def handle(self, session: str, action: str) -> dict:
        """Apply a session's action ("start", "stop" or "status") and return its status.

        The status has a `state`: "idle", "full", "waiting" (with `position`, the number of sessions ahead), "training"
        (with `seconds_left`, or None), "done" or "failed". The last three also have `epoch` (the last one that is
        finished, or -1) and `epochs`.
        """
        if not (isinstance(session, str) and session.isalnum() and len(session) <= 40):
            raise ValueError("a session id has up to 40 letters and digits")
        with self.lock:
            if session in self.queue:
                self.last_seen[session] = time.monotonic()
            self._advance()  # first, so that absent sessions do not keep the queue full
            if action == "start" and session not in self.queue:
                if len(self.queue) >= MAX_QUEUE_LENGTH:
                    return self._status(session) | {"state": "full"}
                self.queue.append(session)
                self.last_seen[session] = time.monotonic()
                self.failed.discard(session)
            elif action == "stop" and session in self.queue:
                self._remove(session)
            self._advance()
            return self._status(session)

    def close(self):
        """Stop training and delete all runs."""
        with self.lock:
            for session in list(self.queue):
                self._remove(session)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _advance(self):
        now = time.monotonic()
        for session in list(self.queue):
            if now - self.last_seen[session] > CLIENT_TIMEOUT:
                self._remove(session)
        if self.process and self.process.poll() is not None:
            self._remove(self.queue[0])
        if self.queue and not self.process:
            try:
                self._start(self.queue[0])
            except OSError:  # such as a full disk
                self.failed.add(self.queue[0])
                self._remove(self.queue[0])

    def _start(self, session: str):
        self.folder.mkdir(mode=0o700, exist_ok=True)  # /tmp may have been cleaned
        run_dir = self.folder / str(time.time_ns())  # a new path for every run: app.py caches models by path
        command = ["nice", sys.executable, SCRIPT, *RECIPE, "--epochs", str(EPOCHS), "--run", run_dir]
        env = os.environ | {"OMP_WAIT_POLICY": "passive"}  # idle threads leave the cores to the server
        quiet = dict.fromkeys(("stdin", "stdout"), subprocess.DEVNULL)
        with open(self.folder / ERRORS, "wb") as errors:  # no terminal, on which the script would draw a progress bar
            self.process = subprocess.Popen(command, cwd=self.folder, env=env, stderr=errors, **quiet)
        self.started, self.earlier_run = time.time(), self.run_dirs.pop(session, None)
        self.run_dirs[session] = run_dir

    def _remove(self, session: str):
        if self.process and session == self.queue[0]:
            if self.process.poll():  # neither running nor finished
                self.failed.add(session)
                with contextlib.suppress(OSError):  # /tmp may have been cleaned
                    print((self.folder / ERRORS).read_text(errors="replace"), file=sys.stderr, flush=True)
            self.process.kill()
            self.process.wait()
            self.process = None
            count = len(read_records(self.run_dirs.get(session)))  # with epoch 0, before training
            if count < 2 and self.earlier_run:
                self.run_dirs[session], self.earlier_run = self.earlier_run, self.run_dirs[session]
            elif count == 0 and session not in self.failed:
                self.earlier_run = self.run_dirs.pop(session)
            if self.earlier_run:
                shutil.rmtree(self.earlier_run, ignore_errors=True)
        self.queue.remove(session)
        del self.last_seen[session]
        finished = [session for session in self.run_dirs if session not in self.queue]
        for session in finished[:-MAX_KEPT_RUNS]:
            shutil.rmtree(self.run_dirs.pop(session), ignore_errors=True)
            self.failed.discard(session)

    def _status(self, session: str) -> dict:
        if session in self.queue[1:]:
            return {"state": "waiting", "position": self.queue.index(session)}
        count = len(read_records(self.run_dirs.get(session)))
        progress = {"epoch": count - 1, "epochs": EPOCHS}
        if session in self.queue:
            left = None  # startup takes longer than an epoch
            if count >= 2:
                last_epoch = (self.run_dirs[session] / "metrics.jsonl").stat().st_mtime
                left = (last_epoch - self.started) / count * (EPOCHS + 1 - count) - (time.time() - last_epoch)
                left = max(round(left), 0)
            return {"state": "training", "seconds_left": left} | progress
        if session in self.failed:
            return {"state": "failed"} | progress
        return {"state": "done"} | progress if count else {"state": "idle"}
