"""Manages a run folder during training: locking, resuming, saving on signals, and a report per epoch.

The training loop calls epochs(), steps(), after_step(), and end_epoch(). A run never calls the model.
"""

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from analysis import HeadStatistics, read_metrics, uniform_non_locality
from training import checkpoint, distributed
from training.augment import derive_seed
from training.distributed import Stopped, UserError, print0, rank
from weights import list_names

PLOT_INTERVAL = 300  # seconds; all ranks wait for a plot
CONTINUE, SAVE, STOP = 0, 1, 2  # after a step; the largest of all ranks wins


class Run:
    """The state of training. `components` (model, ema, optimizer, scaler) are saved in last.pt and restored from it.

    train_state["epoch"] is the epoch in progress, ["step_in_epoch"] how many of its steps are finished. Random numbers
    need no state: every draw is derived from the seed, the step, and the rank.
    """

    def __init__(self, config, data, device: torch.device, **components):
        """Start a run, or resume it. Raises UserError if that is not possible."""
        self.dir, self.config, self.data, self.device = Path(config.run), config, data, device
        self.components = components
        self.train_state = {"epoch": 0, "step_in_epoch": 0, "loss_sum": 0.0}
        self.train_state |= {"num_train": data.num_train, "num_eval": data.num_eval, "num_found": data.num_found}
        self.started = self.saved_at = time.monotonic()
        self.last_plot, self.events = -math.inf, None
        self.provenance = []  # on rank 0, one entry per start
        with contextlib.ExitStack() as self.resources:  # closed here if starting or resuming fails
            resumed = distributed.from_rank0(self._acquire_dir, distributed.was_restarted())
            records = self._resume() if resumed else []
            if self.train_state["epoch"] <= config.total_epochs:
                distributed.from_rank0(self._write_start, records)
            self.resources = self.resources.pop_all()

    @property
    def steps_per_epoch(self) -> int:
        return self.data.epoch_length // self.config.batch_size

    @property
    def first_step(self) -> int:
        """Steps of the current epoch that are already done."""
        return self.train_state["step_in_epoch"]

    def epochs(self) -> Iterator[int]:
        """The epochs left to train. Epoch 0 has no steps: it evaluates the initialization.

        When the loop ends, or is left by an exception, the lock is released and the signal handlers are restored.
        """
        next_epoch, total_epochs = self.train_state["epoch"], self.config.total_epochs
        with self.resources, deferred_signals() as self.signals:
            if next_epoch > total_epochs:
                print0(f"{self.dir} has finished {next_epoch - 1} epochs; pass a larger --epochs to continue")
            elif self.config.tensorboard and rank() == 0:
                from torch.utils.tensorboard import SummaryWriter  # an optional dependency

                writer = SummaryWriter(self.dir / "tensorboard", purge_step=next_epoch)  # hides what is trained again
                self.events = self.resources.enter_context(writer)
            yield from range(next_epoch, total_epochs + 1)

    def steps(self, epoch: int, batches: Iterable) -> Iterator:
        """(step, batch) for all batches of an epoch. Reseeds for every step, so that resuming is bitwise exact."""
        first_step = self.first_step
        self.train_state["epoch"] = epoch
        self.loss_sum = torch.tensor(self.train_state["loss_sum"], device=self.device)
        self.metrics = {"epoch": epoch, "step": epoch * self.steps_per_epoch}
        if epoch == 0:
            return
        shown = {"desc": f"epoch {epoch}", "unit": "img", "unit_scale": self.config.batch_size, "leave": False}
        shown["disable"] = True if rank() > 0 else None  # None: unless the output is a terminal
        self.progress = tqdm(batches, initial=first_step, total=self.steps_per_epoch, **shown)
        self.timed_steps, self.start_time = 0, time.perf_counter()
        for step, batch in enumerate(self.progress, (epoch - 1) * self.steps_per_epoch + first_step):
            torch.manual_seed(derive_seed(self.config.seed, step + 1, rank()))
            yield step, batch

    def after_step(self, step: int, lr: float):
        """Update the progress bar, check the loss, save when due. Raises Stopped after SIGTERM or Ctrl-C."""
        step_in_epoch = step % self.steps_per_epoch + 1
        action = distributed.all_reduce_max(STOP if self.signals else SAVE if self._is_save_due(step + 1) else CONTINUE)
        is_last = step_in_epoch == self.steps_per_epoch
        if action or is_last or step_in_epoch % 50 == 0:  # rarely: it synchronizes with the GPU
            loss_sum = distributed.all_reduce_mean(self.loss_sum).item()
            if not math.isfinite(loss_sum):
                advice = "rerun with a lower --lr (no checkpoint was saved)"
                if (self.dir / "last.pt").exists():
                    advice = "rerun with --resume and a lower --lr or, if the loss diverges again, with another --run"
                raise UserError(f"the loss is no longer finite at step {step + 1}, learning rate {lr:.2g}: {advice}")
            self.progress.set_postfix(loss=f"{loss_sum / step_in_epoch:.3f}")

        # training speed, without the first step (compilation) if there are others, and without the last save
        if is_last:
            duration = time.perf_counter() - self.start_time
            self.metrics["images_per_second"] = max(self.timed_steps, 1) * self.config.batch_size / duration
        elif self.timed_steps == 0:
            self.start_time = time.perf_counter()
        self.timed_steps += 1

        if action or is_last:
            self.train_state |= {"step_in_epoch": step_in_epoch, "loss_sum": loss_sum}
            distributed.from_rank0(self._save)
            self.saved_at = time.monotonic()
        if action == STOP:
            status = 128 + (self.signals[0] if self.signals else signal.SIGTERM)  # as usual after a signal
            raise Stopped(f"stopped and saved after step {step + 1}; rerun with --resume to continue", status)

    def _is_save_due(self, step: int) -> bool:
        every = self.config.save_every
        if every and every.endswith("m"):
            return time.monotonic() - self.saved_at > 60 * int(every[:-1])
        return every is not None and step % int(every) == 0

    def end_epoch(self, metrics: dict, heads: HeadStatistics):
        """Write best.pt and a snapshot when due, metrics.jsonl, and plots; print a summary."""
        epoch, accuracy = self.metrics["epoch"], metrics["test_accuracy"]
        if epoch > 0:
            mean_loss = self.train_state["loss_sum"] / self.steps_per_epoch  # stored after the last step
            self.metrics |= {"train_loss": mean_loss, "lr": self.components["optimizer"].param_groups[0]["lr"]}
        head_metrics = {name: checkpoint.to_json_list(value) for name, value in heads._asdict().items()}
        metrics = self.metrics | metrics | {"heads": head_metrics}
        self.train_state |= {"epoch": epoch + 1, "step_in_epoch": 0, "loss_sum": 0.0}
        best_accuracy = distributed.from_rank0(self._write_epoch, metrics)
        gate = "" if heads.gate.isnan().all() else f"  mean gate {heads.gate.nanmean():.2f}"
        best = "" if best_accuracy is None else f" (best {best_accuracy:.2f}%)"
        split = self.data.eval_split
        print0(f"epoch {epoch:3}  {split} accuracy {accuracy:.2f}%{best}  loss {metrics['test_loss']:.3f}{gate}")

    def _write_epoch(self, metrics: dict) -> float | None:
        """Return the best accuracy so far; None if only a random initialization was evaluated."""
        epoch, model = metrics["epoch"], self.components["ema"].module
        metadata = self.data.classes, self.data.crop_pct
        history = [*read_metrics(self.dir), metrics]
        trained = [record["test_accuracy"] for record in history if record["epoch"] > 0 or self.config.weights]
        best_accuracy = max(trained, default=None)
        if metrics["test_accuracy"] == best_accuracy:
            checkpoint.save_weights(model, *metadata, epoch, self.dir / "best.pt")
        if epoch in checkpoint.snapshot_epochs(self.config.total_epochs):
            file = self.dir / "snapshots" / f"epoch_{epoch:04d}.pt"
            checkpoint.save_weights(model, *metadata, epoch, file, half=True)
        self.provenance[-1]["wall_clock_s"] = round(time.monotonic() - self.started)
        checkpoint.write_json(self.dir / "provenance.json", self.provenance)
        self._plot(history, is_final=epoch == self.config.total_epochs)
        if self.events:
            for name, value in metrics.items():
                if isinstance(value, float):
                    self.events.add_scalar(name, value, epoch)
            for layer, gates in enumerate(metrics["heads"]["gate"], 1):
                if None not in gates:
                    self.events.add_scalar(f"mean gate/layer {layer}", sum(gates) / len(gates), epoch)
            self.events.flush()
        self._write_metrics(history)  # last: its record marks the epoch as finished
        return best_accuracy

    def _write_start(self, records: list[dict]):
        """Write the config, the provenance, and the records of the epochs that are kept."""
        self.provenance.append(checkpoint.provenance(self.device) | {"job": distributed.job_id()})
        checkpoint.write_json(self.dir / "provenance.json", self.provenance)
        checkpoint.write_json(self.dir / "config.json", dataclasses.asdict(self.config))
        self._write_metrics(records)

    def _write_metrics(self, records: list[dict]):
        checkpoint.write_text(self.dir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    def _acquire_dir(self, restarted: bool) -> bool:
        """Lock the run folder until training ends. Return whether to resume the run in it.

        After an automatic torchrun restart, training resumes without --resume. Raises UserError if the folder contains
        a run that should not be resumed, or if another process is using it.
        """
        resumed, file = self.config.resume, self.dir / "provenance.json"
        if (self.dir / "last.pt").exists():
            self.provenance = json.loads(file.read_text()) if file.exists() else []
            resumed = resumed or (restarted and distributed.job_id() in [entry["job"] for entry in self.provenance])
            if not resumed:
                raise UserError(f"{self.dir} already contains a run: add --resume to continue, or choose another --run")
        elif (self.dir / "metrics.jsonl").exists() and any(record["epoch"] > 0 for record in self._read_metrics()):
            raise UserError(f"{self.dir} contains a run without its last.pt: choose another --run")
        try:
            import fcntl
        except ImportError as error:
            raise UserError("training needs Linux or macOS; on Windows, use WSL") from error
        (self.dir / "snapshots").mkdir(parents=True, exist_ok=True)
        lock = os.open(self.dir / "lock", os.O_RDWR | os.O_CREAT)
        self.resources.callback(os.close, lock)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by forked workers
        except (BlockingIOError, PermissionError) as error:
            message = f"another process is training in {self.dir}: wait for it, or choose another --run"
            raise UserError(message) from error
        except OSError as error:  # some network file systems have no locks
            print0(f"note: {self.dir} cannot be locked ({error}): start no second process in it")
        return resumed

    def _resume(self) -> list[dict]:
        """Restore all components and the training state from last.pt; return the records of finished epochs."""
        file = self.dir / "last.pt"
        record = checkpoint.load(file)
        try:
            saved_config, state = record["config"], record["train_state"]
            self.config.check_same_run(saved_config)
            self.config.weights = saved_config["weights"]  # not loaded again, but part of the run
            if (found := self.data.classes) != (trained := record["classes"]):
                old, new = (list_names(set(a) - set(b)) or "none" for a, b in ((trained, found), (found, trained)))
                change = f"the classes differ from those of {self.dir} (missing: {old}; new: {new})"
                raise UserError(f"{change}: restore them, or choose another --run")
            for name, component in self.components.items():
                if record[name]:  # a scaler has no state without fp16
                    component.load_state_dict(record[name])
            self._check_images(state)
        except torch.OutOfMemoryError:  # a RuntimeError, but the file is fine
            raise
        except (RuntimeError, ValueError, KeyError) as error:  # changed code, or a run of an older version
            raise UserError(f"{file} does not match this model and data: {error}") from error
        records = distributed.from_rank0(self._read_metrics)
        if state["step_in_epoch"] == self.steps_per_epoch and any(r["epoch"] == state["epoch"] for r in records):
            state |= {"epoch": state["epoch"] + 1, "step_in_epoch": 0, "loss_sum": 0.0}  # it was evaluated, too
        self.train_state = state
        return [record for record in records if record["epoch"] < state["epoch"]]

    def _read_metrics(self) -> list[dict]:
        try:
            return read_metrics(self.dir)
        except (OSError, ValueError) as error:  # missing, or damaged by a merge conflict
            raise UserError(f"{error}: restore the file, or choose another --run") from error

    def _check_images(self, state: dict):
        """Keep the length of the run's epochs, and compare the numbers of images with those at its start."""
        self.data.epoch_length = self.config.epoch_length(state["num_train"])
        name = "num_found" if "num_found" in state else "num_train"  # older runs lack it
        before, now = (state[name], state["num_eval"]), (getattr(self.data, name), self.data.num_eval)
        if before == now:
            return
        subset = " (before --data-fraction)" if self.config.data_fraction < 1 and name == "num_found" else ""
        counts = f"there are {now[0]} training{subset} and {now[1]} evaluation images"
        change = f"{counts}, but {self.dir} started with {before[0]} and {before[1]}"
        if self.config.val_fraction:  # the split would change: training images could be evaluated on
            repair = "restore the original files (--skip-bad-images leaves out unreadable ones)"
            advice = f"{repair}, or choose another --run"
            raise UserError(f"{change}: {advice}")
        print0(f"note: {change}; the run continues, but is no longer exactly reproducible")

    def _save(self):
        """Write last.pt: all components, the flags, and the training state."""
        record = {name: component.state_dict() for name, component in self.components.items()}
        record |= {"config": dataclasses.asdict(self.config), "train_state": self.train_state}
        record |= checkpoint.model_metadata(self.components["model"], self.data.classes, self.data.crop_pct)
        checkpoint.write(self.dir / "last.pt", partial(torch.save, record))

    def _plot(self, history: list[dict], is_final: bool):
        if is_final or time.monotonic() - self.last_plot > PLOT_INTERVAL:
            from training.plots import plot_run  # slow to import

            grid = self.components["model"].config.grid
            plot_run(history, self.dir, uniform_non_locality(grid), self.data.eval_split)
            self.last_plot = time.monotonic()


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Record SIGTERM and Ctrl-C in the yielded list, so that the current step can be finished and saved."""
    received = []

    def handle(number: int, _):
        received.append(number)
        if distributed.local_rank() == 0:
            again = "" if "RANK" in os.environ else "; the same signal again stops at once, without saving"
            print(f"\nstopping after the current step{again}", file=sys.stderr, flush=True)
        if "RANK" not in os.environ:  # torchrun may deliver the same signal twice
            signal.signal(number, previous[number])

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
