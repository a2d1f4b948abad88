"""Computes everything the viewer displays: attention maps, predictions, and training curves."""

import base64
import io
import json
import math
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.func import functional_call

import analysis
from convit_min import ConViT, kernel_shape
from images import center_crop, normalize
from viewer.limits import load_upload
from weights import open_model, snapshot_files

DISPLAY_SIZE = 384  # maximum side of a displayed image, in pixels
CACHE_BYTES = 2**26  # content maps kept in memory: about 30 images of a demo
TOP_CLASSES = 3


class Maps(NamedTuple):
    """Output of one model for one image."""

    content: Tensor  # l h n n, uint8: 255 C / peak, between patches
    peak: Tensor  # l h: maximum of each head's content maps
    probabilities: Tensor  # one per class


def run_on_worker_thread(method):
    """Run a method on the inspector's single thread: parallel forward passes would compete for cores and memory."""

    @wraps(method)
    def submit(self, *args):
        return self.worker.submit(method, self, *args).result()

    return submit


class AttentionInspector:
    """All snapshots of a model, in training order. Thread-safe."""

    def __init__(
        self, name: str, classes: list[str], models: list[ConViT], epochs: list[int], run_dir: Path | None = None
    ):
        """Takes models in eval mode; `open_run` and `open_weights` load files."""
        self.name, self.classes, self.models, self.epochs, self.run_dir = name, classes, models, epochs, run_dir
        self.config = models[0].config
        self.train_config = read_json(run_dir / "config.json") if run_dir else {}
        self.worker = ThreadPoolExecutor(1)
        bytes_per_image = self.config.depth * self.config.num_heads * math.prod(self.config.grid) ** 2
        self._cached_maps = lru_cache(max(CACHE_BYTES // bytes_per_image, 2 * len(models)))(self._compute_maps)

    @run_on_worker_thread
    def refresh(self):
        """Load the snapshots that the run has written since."""
        if self.run_dir is None or not self.run_dir.exists():
            return
        for file in snapshot_files(self.run_dir)[len(self.models) :]:
            model = open_model(file)
            self.models.append(model)
            self.epochs.append(model.epoch)

    def describe(self) -> dict:
        """Everything independent of the image: shapes, epochs, gate and v_pos per snapshot, layer, and head.

        Gates and v_pos of self-attention layers are None.
        """
        models = self.models[: len(self.epochs)]  # refresh may be appending
        plain = [None] * (self.config.depth - self.config.gpsa_layers)
        gpsa_blocks = [[model.blocks[layer] for layer in self.config.gpsa_blocks] for model in models]
        return {
            "name": self.name,
            "grid": self.config.grid,
            "kernel": kernel_shape(self.config.num_heads),
            "classes": self.classes,
            "epochs": self.epochs[: len(models)],
            "last_epoch": max(self.epochs[-1] or 0, self.last_epoch()),
            "gate": [[block.attn.gate().tolist() for block in blocks] + plain for blocks in gpsa_blocks],
            "v_pos": [[block.attn.pos_proj.weight.tolist() for block in blocks] + plain for blocks in gpsa_blocks],
            "curves": read_curves(self.run_dir, self.name) if self.run_dir else None,
            "masking": read_json(self.run_dir / "masking.json") if self.run_dir else {},
            "recipe": {name: self.train_config.get(name) for name in ("dataset", "gate_lr_scale", "seed")},
            "uniform": analysis.uniform_non_locality(self.config.grid),
        }

    def last_epoch(self) -> int:
        """The epoch that the run ends with; 0 if unknown."""
        fraction = self.train_config["data_fraction"] if self.train_config.get("scale_epochs") else 1
        return round(self.train_config.get("epochs", 0) / fraction)

    def telling_head(self, pixels: str, queries: tuple[int, ...], target: tuple[int, ...]) -> tuple[float, int, int]:
        """A score, and the layer and head with the highest one in the last snapshot.

        The score is by how much the attention from any of the query patches to the target grows in training, or,
        without these, how far the gate is from 1.
        """
        gates = analysis.gates(self.models[-1]).nan_to_num(1)  # l h
        score = 1 - gates
        if target:
            attention = [self._forward(self._decode_pixels(pixels), snapshot, None)[1] for snapshot in (0, -1)]
            mixed = [torch.stack([self._between_patches(layer.mixed[0]) for layer in layers]) for layers in attention]
            growth = (mixed[1] - mixed[0])[:, :, queries][..., target].sum(dim=3).amax(dim=2)  # l h
            score = growth * (gates < 0.5)
        return score.max().item(), *divmod(score.argmax().item(), self.config.num_heads)

    def learns(self, pixels: str, label: str | None) -> bool:
        """Whether the last snapshot predicts the label of an image, and the first one does not."""
        predicted = [self._cached_maps(self._decode_pixels(pixels), s).probabilities.argmax().item() for s in (0, -1)]
        return [self.classes[index] == label for index in predicted] == [False, True]

    def prepare_image(self, file: Path | bytes) -> dict:
        """Crop an image for the page.

        Returns data URLs for `display` and for the `input` of the model, and the `pixels` that other methods take.
        Raises ValueError, with a message for the user, if the file is not an image or is too large.
        """
        image = load_upload(file.read_bytes() if isinstance(file, Path) else file, 2 * DISPLAY_SIZE)
        crop_pct = self.models[-1].crop_pct
        cropped = center_crop(image, *self.config.image_shape, crop_pct)
        rows, columns = self.config.grid
        patch_side = max(DISPLAY_SIZE // max(rows, columns), 1)  # a whole number of pixels
        display = center_crop(image, rows * patch_side, columns * patch_side, crop_pct)
        return {
            "display": data_url(encode_image(display, "JPEG", quality=90), "image/jpeg"),
            "input": data_url(encode_image(cropped, "PNG"), "image/png"),
            "pixels": _encode(cropped.tobytes()),
        }

    def layer_maps(self, pixels: str, layer: int) -> dict:
        """Content maps of one layer in all snapshots, as bytes 255 C / peak, and the predictions.

        `pixels` comes from `prepare_image`. Raises ValueError for invalid arguments.
        """
        pixel_bytes = self._decode_pixels(pixels, layer)
        snapshots = [self._cached_maps(pixel_bytes, snapshot) for snapshot in range(len(self.epochs))]
        return {
            "content": [_encode(maps.content[layer].numpy().tobytes()) for maps in snapshots],
            "peaks": [maps.peak[layer].tolist() for maps in snapshots],
            "predictions": [self._top_classes(maps.probabilities, maps.probabilities) for maps in snapshots],
        }

    def recompute(self, pixels: str, layer: int, snapshot: int, gates: list) -> dict:
        """`layer_maps` of one snapshot, run with different gates; predictions before and after the change.

        `gates` (l h) may contain None for trained gates, and for layers without gates.
        """
        pixel_bytes = self._decode_pixels(pixels, layer)
        before = self._cached_maps(pixel_bytes, snapshot)
        after = self._compute_maps(pixel_bytes, snapshot, self._validate_gates(gates))
        return {
            "content": _encode(after.content[layer].numpy().tobytes()),
            "peaks": after.peak[layer].tolist(),
            "predictions": self._top_classes(before.probabilities, after.probabilities),
        }

    @run_on_worker_thread
    def head_maps(self, pixels: str, layer: int, snapshot: int, query: int, gates: list | None = None) -> list[dict]:
        """Gate and attention maps (nested lists Y X) of every head of one layer for one query patch.

        `query` is the row-major patch index; snapshot -1 is the last one; `gates` are those of `recompute`. Position
        maps of self-attention layers are None.
        """
        pixel_bytes = self._decode_pixels(pixels, layer)
        rows, columns = self.config.grid
        if query not in range(rows * columns):
            raise ValueError(f"expected a patch of a grid of {rows} x {columns}")
        new_gates = None if gates is None else self._validate_gates(gates)
        attention = self._forward(pixel_bytes, snapshot, new_gates)[1][layer]

        def grids(maps: Tensor) -> list:
            return rearrange(self._between_patches(maps)[:, query], "h (Y X) -> h Y X", Y=rows).tolist()

        content, mixed = grids(attention.content[0]), grids(attention.mixed[0])
        position = [None] * len(mixed) if attention.position is None else grids(attention.position)
        heads = zip(attention.gate.tolist(), position, content, mixed, strict=True)
        return [dict(zip(("gate", "position", "content", "mixed"), values, strict=True)) for values in heads]

    def _between_patches(self, maps: Tensor) -> Tensor:
        """Attention maps (... n n) without the class token, which comes first where it is present."""
        num_extra = maps.shape[-1] - math.prod(self.config.grid)
        return maps[..., num_extra:, num_extra:]

    def _validate_gates(self, gates: list) -> Tensor:
        """Gates (l h) as a tensor, NaN where they are None."""
        depth, heads = self.config.depth, self.config.num_heads
        rows = [[math.nan if gate is None else gate for gate in row or [None] * heads] for row in gates]
        values = torch.tensor(rows, dtype=torch.float32)
        if values.shape != (depth, heads) or ((values < 0) | (values > 1)).any():
            raise ValueError(f"expected a gate from 0 to 1, or null, for {depth} layers of {heads} heads")
        return values

    def _decode_pixels(self, pixels: str, layer: int = 0) -> bytes:
        height, width = self.config.image_shape
        pixel_bytes = base64.b64decode(pixels, validate=True)
        layer_exists = isinstance(layer, int) and 0 <= layer < self.config.depth
        if len(pixel_bytes) != 3 * height * width or not layer_exists:
            raise ValueError(f"expected {width} x {height} pixels and a layer from 0 to {self.config.depth - 1}")
        return pixel_bytes

    @run_on_worker_thread
    def _compute_maps(self, pixel_bytes: bytes, snapshot: int, gates: Tensor | None = None) -> Maps:
        logits, attention = self._forward(pixel_bytes, snapshot, gates)
        content = torch.stack([self._between_patches(layer.content[0]) for layer in attention])  # l h n n
        peak = content.amax(dim=(2, 3))
        return Maps((255 * content / peak[..., None, None]).round().byte(), peak, logits[0].softmax(dim=0))

    @torch.inference_mode()
    def _forward(self, pixel_bytes: bytes, snapshot: int, gates: Tensor | None) -> tuple[Tensor, list]:
        """Logits and attention of one snapshot; `gates` (l h) replace the trained ones where they are not NaN."""
        count = len(self.epochs)
        if snapshot not in range(-count, count):
            raise ValueError(f"expected a snapshot from {-count} to {count - 1}")
        pixels = np.frombuffer(pixel_bytes, dtype=np.uint8).reshape(*self.config.image_shape, 3)
        image = normalize(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
        model, overrides = self.models[snapshot], {}
        for layer in self.config.gpsa_blocks if gates is not None else ():
            trained, new = model.blocks[layer].attn.gating_param, gates[layer]
            overrides[f"blocks.{layer}.attn.gating_param"] = torch.where(new.isnan(), trained, new.logit(eps=1e-6))
        return functional_call(model, overrides, (image,), {"return_attention": True})

    def _top_classes(self, before: Tensor, after: Tensor) -> list[tuple[str, float, float]]:
        """Most likely classes, before or after a change, with both probabilities."""
        count = min(TOP_CLASSES, len(self.classes))
        top = dict.fromkeys([*before.topk(count).indices.tolist(), *after.topk(count).indices.tolist()])
        return [(self.classes[index], round(before[index].item(), 4), round(after[index].item(), 4)) for index in top]


def open_run(run_dir: Path | str, name: str | None = None) -> AttentionInspector:
    """Inspect the snapshots of a run; `name` defaults to the folder's name.

    Raises FileNotFoundError or ValueError if there are no readable snapshots.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"there is no folder {run_dir}")
    files = snapshot_files(run_dir)
    if not files:
        raise FileNotFoundError(f"{run_dir} has no snapshots; pass a run folder of train_cifar.py with --run")
    models = [open_model(file) for file in files]
    epochs = [model.epoch for model in models]
    return AttentionInspector(name or run_dir.name, models[-1].classes, models, epochs, run_dir)


def open_weights(source: str) -> AttentionInspector:
    """Inspect one set of weights: a file, a URL, or a released model. Raises FileNotFoundError or ValueError."""
    model = open_model(source)
    return AttentionInspector(model.name, model.classes, [model], [model.epoch or None])  # 0: unknown


def read_json(file: Path) -> dict:
    """The dictionary in a JSON file; empty if the file is missing or damaged."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_curves(run_dir: Path, name: str) -> dict | None:
    """Metrics of a run as one list per metric, indexed by epoch; None if the run has no metrics."""
    records = analysis.read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    if not records:
        return None
    heads = {key: [record["heads"][key] for record in records] for key in ("gate", "non_locality")}
    scores = {key: [record.get(key) for record in records] for key in ("test_accuracy", "test_loss", "train_loss")}
    return {"name": name, "epochs": [record["epoch"] for record in records]} | heads | scores


def encode_image(image: Image.Image, file_format: str, **options) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def data_url(data: bytes, media_type: str) -> str:
    """A file as a data URL, for the src of an <img>."""
    return f"data:{media_type};base64,{_encode(data)}"


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()
