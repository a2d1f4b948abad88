"""Loss and accuracy of a model on a dataset, and the report that --eval writes."""

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from convit_min import ConViT
from images import normalize
from training import checkpoint, distributed
from training.data import index_classes
from training.distributed import UserError, print0
from training.optim import autocast
from weights import infer_model, open_model


class Predictions(NamedTuple):
    """What a model predicts for every evaluation image, in the order of the images (n each, float64, on the CPU)."""

    index: Tensor  # of the image
    label: Tensor
    predicted: Tensor  # the most likely class
    probability: Tensor  # of that class
    loss: Tensor  # cross-entropy
    in_top5: Tensor  # 1 if the label is among the five most likely classes

    def metrics(self, num_classes: int) -> dict[str, float]:
        """Mean loss, and top-1 and (of more than five classes) top-5 accuracy in percent."""
        metrics = {"test_loss": self.loss, "test_accuracy": 100.0 * (self.label == self.predicted).double()}
        metrics |= {"test_accuracy_top5": 100 * self.in_top5} if num_classes > 5 else {}
        return {name: values.mean().item() for name, values in metrics.items()}


@torch.inference_mode()
def predict_all(model: ConViT, batches: Iterable, device: torch.device, amp: str) -> Predictions:
    """Predictions for the batches of all processes.

    Batches are pixels in 0..255 (b 3 H W), labels (b), and indices of the images (b), on the device; every image is in
    one batch of one process.
    """
    model.eval()
    rows = [torch.empty(0, len(Predictions._fields), dtype=torch.float64, device=device)]
    for images, labels, indices in batches:
        with autocast(device, amp):
            logits = model(normalize(images))
        probabilities = logits.float().softmax(dim=1)
        top_probabilities, top_classes = probabilities.topk(min(5, logits.shape[1]))
        loss = F.cross_entropy(logits.float(), labels, reduction="none")
        in_top5 = (top_classes == labels[:, None]).any(dim=1)
        columns = [indices, labels, top_classes[:, 0], top_probabilities[:, 0], loss, in_top5]
        rows.append(torch.stack([column.double() for column in columns], dim=1))
    table = distributed.all_gather(torch.cat(rows).cpu())
    return Predictions(*table[table[:, 0].argsort()].unbind(dim=1))


def evaluate(model: ConViT, batches: Iterable, device: torch.device, amp: str) -> dict[str, float]:
    """Loss and accuracy, as in `Predictions.metrics`, for the batches of `predict_all`."""
    return predict_all(model, batches, device, amp).metrics(model.config.num_classes)


def evaluate_weights(config, load_data: Callable):
    """Evaluate --weights, print the scores, and write eval.json (with --csv, also eval.csv) into the run folder.

    The images are preprocessed as the weights file records, and matched with its classes by name. Raises UserError if
    that is not possible.
    """
    device, folder = distributed.init(config.device), Path(config.run)
    provenance = checkpoint.provenance(device)
    try:
        model = open_model(config.weights).to(device)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    config.model = infer_model(model.state_dict())[0] or model.name
    height, width = model.config.image_shape
    if height != width and not config.img_size:
        raise UserError(f"--eval uses square images, but {config.weights} is for {height} x {width}: add --img-size")
    config.img_size = config.img_size or height
    if config.img_size % model.config.patch_size:
        raise UserError(f"--img-size {config.img_size} must be a multiple of the patch size, {model.config.patch_size}")
    data = load_data(config, device, model.crop_pct)
    label_map = match_classes(model, data.classes, config.weights).to(device)
    batches = ((images, label_map[labels], indices) for images, labels, indices in data.eval_batches())
    distributed.from_rank0(partial(folder.mkdir, parents=True, exist_ok=True))  # fails before the evaluation, not after
    predictions = predict_all(model, batches, device, config.amp)

    metrics, count = predictions.metrics(len(model.classes)), len(predictions.index)
    scores = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
    print0(f"{config.weights}: {scores} ({count} {data.eval_split} images)")
    report = {"weights": config.weights, "data_dir": config.data_dir, "split": data.eval_split, "images": count}
    report |= metrics | {"provenance": provenance}
    names = data.eval_names if config.csv else None
    distributed.from_rank0(write_report, report, predictions, model.classes, folder, names)


def write_report(report: dict, predictions: Predictions, classes: list[str], folder: Path, names: Sequence | None):
    """Write eval.json: the report, accuracy per class, and the confusion matrix; with names, eval.csv, a row per image.

    `names` are those of the images; without them, an eval.csv of an earlier evaluation is removed. Raises UserError or
    OSError.
    """
    k = len(classes)
    cells = (predictions.label * k + predictions.predicted).long()
    confusion = cells.bincount(minlength=k * k).unflatten(0, (k, k))  # rows: labels, columns: predictions
    per_class = {
        name: {"images": total, "test_accuracy": 100 * correct / total if total else None}
        for name, total, correct in zip(classes, confusion.sum(1).tolist(), confusion.diag().tolist(), strict=True)
    }
    report |= {"classes": per_class, "confusion": confusion.tolist()}
    checkpoint.write_text(folder / "eval.json", json.dumps(report) + "\n")
    (folder / "eval.csv").unlink(missing_ok=True)  # of an earlier evaluation
    if names is not None:
        with open(folder / "eval.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.writer(file)
            rows.writerow(["file", "class", "predicted", "probability", "loss"])
            for index, label, predicted, probability, loss, _ in zip(*map(Tensor.tolist, predictions), strict=True):
                cells = names[int(index)], classes[int(label)], classes[int(predicted)]
                rows.writerow([*cells, f"{probability:.4f}", f"{loss:.4f}"])
    print(f"The report is in {folder}/eval.json{' and eval.csv' if names is not None else ''}", flush=True)


def match_classes(model: ConViT, classes: list[str], source: str) -> Tensor:
    """The index of every class in `model.classes`; without names in the weights file, classes match by order (k).

    Raises UserError if a name, or without names their number, does not match.
    """
    if model.has_class_names:
        return index_classes(classes, model.classes, source)
    if len(classes) != len(model.classes):
        counts = f"{source} has {len(model.classes)} classes, but the images have {len(classes)}"
        raise UserError(f"{counts}: fine-tune it first, with --weights and without --eval")
    print0(f"note: {source} has no class names: classes are matched by order")
    return torch.arange(len(classes))
