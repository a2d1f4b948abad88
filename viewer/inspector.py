"""Computes everything the viewer displays: attention maps, predictions, and training curves."""

import base64
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, wraps
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.func import functional_call

import analysis
from convit_min import GPSA, ConViT, kernel_shape
from images import center_crop, decode_size, normalize
from viewer.examples import load_examples, thumbnail
from viewer.limits import data_url, encode_base64, encode_image, load_upload
from weights import open_model, snapshot_files

DEMOS = {"patterns": "Find the match (synthetic)", "cifar10": "CIFAR-10 photos"}  # folder in demo/: title
DISPLAY_SIZE = 384  # maximum side of a displayed image, in pixels
CACHE_BYTES = 2**26  # content maps of a model in memory, in base64: about 24 images of demo/patterns, all snapshots
MAX_SNAPSHOTS = 16  # of a run that may still be training, see training/checkpoint.py
TOP_CLASSES = 4
worker = ThreadPoolExecutor(1)


def run_on_worker(method):
    """Run a method on the only thread that computes: parallel forward passes would compete for cores and memory."""

    @wraps(method)
    def submit(*args):
        return worker.submit(method, *args).result()

    return submit


class AttentionInspector:
    """All snapshots of a model, in training order. Thread-safe."""

    def __init__(self, name: str, models: list[ConViT], run_dir: Path | None = None):
        """Takes models of `open_model`; `open_run` and `open_weights` load files."""
        self.name, self.models, self.run_dir = name, models, run_dir
        self.config, self.classes = models[0].config, models[0].classes
        self.train_config = read_json(run_dir, "config.json")
        self.examples = load_examples(self.train_config, run_dir, self.classes, self.config.grid)
        bytes_per_image = self.config.depth * self.config.num_heads * math.prod(self.config.grid) ** 2 * 4 // 3
        snapshots = max(len(models), MAX_SNAPSHOTS if run_dir else 1)
        self._cached_maps = lru_cache(max(CACHE_BYTES // bytes_per_image, 2 * snapshots))(self._compute_maps)
        self._opening = run_on_worker(lru_cache(maxsize=1)(self._find_opening))
        self.started = snapshot_files(run_dir)[0].stat().st_mtime_ns if run_dir else 0

    @run_on_worker
    def refresh(self) -> "AttentionInspector":
        """Load the snapshots that the run has written since. Returns another inspector if a new run took its folder."""
        files = snapshot_files(self.run_dir) if self.run_dir else []
        if files and files[0].stat().st_mtime_ns != self.started:
            return open_run(self.run_dir, self.name)
        self.models += map(open_model, files[len(self.models) :])
        return self

    def describe(self) -> dict:
        """Everything that the page shows without an image; gate and v_pos are per snapshot, layer, and head.

        Gates and v_pos of self-attention layers are None.
        """
        models = list(self.models)  # refresh may be appending
        # a resumed run may have more epochs; one that is being replaced has no file
        config = self.train_config = read_json(self.run_dir, "config.json") or self.train_config
        fraction = config["data_fraction"] if config.get("scale_epochs") else 1

        @run_on_worker  # where gates are replaced for the duration of a forward pass
        def per_layer(statistic: Callable[[GPSA], Tensor]) -> list:
            return [[statistic(block.attn).tolist() if isinstance(block.attn, GPSA) else None for block in model.blocks]
                    for model in models]  # fmt: skip

        return {
            "name": self.name,
            "grid": self.config.grid,
            "kernel": kernel_shape(self.config.num_heads),
            "classes": self.classes,
            "epochs": [model.epoch for model in models],
            "last_epoch": max(models[-1].epoch or 0, round(config.get("epochs", 0) / fraction)),
            "gate": per_layer(GPSA.gate),
            "v_pos": per_layer(lambda attn: attn.pos_proj.weight),
            "curves": self.curves(),
            "masking": read_json(self.run_dir, "masking.json"),
            "recipe": {name: config.get(name) for name in ("dataset", "gate_lr_scale", "seed")},
            "uniform": analysis.uniform_non_locality(self.config.grid),
            "examples": [
                {"name": name, "thumbnail": thumbnail(data), "label": label, "queries": queries, "target": target}
                for name, (data, label, queries, target) in self.examples.items()
            ],
            "opening": self._opening(len(models)),  # the page asks every second while a model trains
        }

    def curves(self) -> dict | None:
        """Metrics of the run as one list per metric, indexed by epoch; None if there are no metrics."""
        records = read_records(self.run_dir)
        if not records:
            return None
        heads = {key: [record["heads"][key] for record in records] for key in ("gate", "non_locality")}
        scores = {key: [record.get(key) for record in records] for key in ("test_accuracy", "test_loss", "train_loss")}
        return {"name": self.name, "epochs": [record["epoch"] for record in records]} | heads | scores

    def _find_opening(self, num_snapshots: int) -> dict:
        """The view that shows most: an example that the model learns to classify, and the head that escapes most.

        This is the head whose attention from any of the example's query patches to its target grows most in training,
        or, without these, the one whose gate is lowest.
        """
        first, last = self.models[0], self.models[num_snapshots - 1]
        gates = analysis.gates(last).nan_to_num(1)  # l h
        examples, views = list(self.examples.items()), []
        for name, (file, label, queries, target) in examples if num_snapshots > 1 else examples[:1]:
            pixels = self._decode_pixels(self.prepare_image(file)["pixels"])
            (logits, before), (last_logits, after) = (self._forward(pixels, model) for model in (first, last))
            is_learned = self.classes[last_logits.argmax()] == label != self.classes[logits.argmax()]
            score = 1 - gates
            if target:
                before, after = (torch.stack([self._between_patches(layer.mixed[0]) for layer in maps])
                                 for maps in (before, after))  # fmt: skip
                growth = (after - before)[:, :, queries][..., target].sum(dim=3).amax(dim=2)  # l h
                score = growth * (gates < 0.5)
            layer, head = divmod(score.argmax().item(), self.config.num_heads)
            views.append((is_learned, score.max().item(), {"image": name, "layer": layer, "head": head}))
        return max(views, key=lambda view: view[:2])[2]

    def prepare_image(self, file: bytes) -> dict:
        """Crop an image for the page.

        Returns data URLs for `display` and for the `input` of the model, and the `pixels` that other methods take.
        Raises ValueError, with a message for the user, if the file is not an image or is too large.
        """
        (rows, columns), crop_pct = self.config.grid, self.models[-1].crop_pct
        patch_side = max(DISPLAY_SIZE // max(rows, columns), 1)  # a whole number of pixels
        image = load_upload(file, decode_size(*self.config.image_shape))
        cropped = center_crop(image, *self.config.image_shape, crop_pct)
        display = center_crop(image, rows * patch_side, columns * patch_side, crop_pct)
        return {
            "display": data_url(encode_image(display, "JPEG", quality=90), "jpeg"),
            "input": data_url(encode_image(cropped, "PNG"), "png"),
            "pixels": encode_base64(cropped.tobytes()),
        }

    def layer_maps(self, pixels: str, layer: int) -> list[dict]:
        """Content maps of one layer in every snapshot, as in `_compute_maps`, and the predictions.

        `pixels` comes from `prepare_image`. Raises ValueError for invalid arguments.
        """
        pixel_bytes = self._decode_pixels(pixels, layer)
        outputs = [self._cached_maps(pixel_bytes, model) for model in list(self.models)]
        return [layers[layer] | {"predictions": self._top_classes(p, p)} for layers, p in outputs]

    def recompute(self, pixels: str, layer: int, snapshot: int, gates: list) -> dict:
        """`layer_maps` of one snapshot, run with different gates; predictions before and after the change.

        `gates` (l h) may contain None for trained gates, and for layers without gates.
        """
        pixel_bytes, model = self._decode_pixels(pixels, layer), self.models[snapshot]
        _, before = self._cached_maps(pixel_bytes, model)
        layers, after = self._compute_maps(pixel_bytes, model, gates)
        return layers[layer] | {"predictions": self._top_classes(before, after)}

    @run_on_worker
    def head_maps(self, pixels: str, layer: int, snapshot: int, query: int, gates: list | None = None) -> list[dict]:
        """Gate and attention maps (nested lists Y X) of every head of one layer for one query patch.

        `query` is the row-major patch index; snapshot -1 is the last one; `gates` are those of `recompute`. Position
        maps of self-attention layers are None.
        """
        rows, columns = self.config.grid
        analysis.check_index("patch", query, 0, rows * columns - 1)
        attention = self._forward(self._decode_pixels(pixels, layer), self.models[snapshot], gates)[1][layer]

        def grids(maps: Tensor) -> list:
            return rearrange(self._between_patches(maps)[:, query], "h (Y X) -> h Y X", Y=rows).tolist()

        content, mixed = grids(attention.content[0]), grids(attention.mixed[0])
        position = [None] * len(mixed) if attention.position is None else grids(attention.position)
        heads = zip(attention.gate.tolist(), position, content, mixed, strict=True)
        return [dict(zip(("gate", "position", "content", "mixed"), values, strict=True)) for values in heads]

    def _between_patches(self, maps: Tensor) -> Tensor:
        """Attention maps (... n n) without the class token, which comes first where it is present."""
        num_patches = math.prod(self.config.grid)
        return maps[..., -num_patches:, -num_patches:]

    def _decode_pixels(self, pixels: str, layer: int = 0) -> bytes:
        height, width = self.config.image_shape
        pixel_bytes = base64.b64decode(pixels, validate=True)
        if len(pixel_bytes) != 3 * height * width:
            raise ValueError(f"expected {width} x {height} pixels")
        analysis.check_index("layer", layer + 1, 1, self.config.depth)  # counted from 1 wherever users see it
        return pixel_bytes

    @run_on_worker
    def _compute_maps(self, pixel_bytes: bytes, model: ConViT, gates: list | None = None) -> tuple[list[dict], Tensor]:
        """Every layer, ready for JSON, and the class probabilities.

        Of each head: its content map between patches as bytes 255 C / peak, the peak, and the mean attention distances
        of content and position map.
        """
        logits, attention = self._forward(pixel_bytes, model, gates)
        layers = []
        for maps in attention:
            content = self._between_patches(maps.content[0])  # h n n
            peaks = content.amax(dim=(1, 2))
            quantized = (content * (255 / peaks[:, None, None])).round().byte()
            position = maps.content if maps.position is None else maps.position[None]
            distances = [analysis.mean_distance(kind, self.config.grid) for kind in (maps.content, position)]
            layer = {"content": encode_base64(quantized.numpy().tobytes()), "peaks": peaks.tolist()}
            layers.append(layer | {"distances": torch.stack(distances, dim=1).tolist()})
        return layers, logits[0].softmax(dim=0)

    @torch.inference_mode()
    def _forward(self, pixel_bytes: bytes, model: ConViT, gates: list | None = None) -> tuple[Tensor, list]:
        """Logits and attention; `gates` (l h) replace the trained ones where they are not None."""
        pixels = np.frombuffer(pixel_bytes, dtype=np.uint8).reshape(*self.config.image_shape, 3)
        image, overrides = normalize(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]), {}
        if gates is not None:
            depth, heads = self.config.depth, self.config.num_heads
            rows = [[math.nan if gate is None else gate for gate in row or [None] * heads] for row in gates]
            values = torch.tensor(rows, dtype=torch.float32)
            if values.shape != (depth, heads) or ((values < 0) | (values > 1)).any():
                raise ValueError(f"expected a gate from 0 to 1, or null, for {depth} layers of {heads} heads")
            for layer in self.config.gpsa_blocks:
                trained, new = model.blocks[layer].attn.gating_param, values[layer].logit(eps=1e-6)
                overrides[f"blocks.{layer}.attn.gating_param"] = torch.where(new.isnan(), trained, new)
        return functional_call(model, overrides, (image,), {"return_attention": True})

    def _top_classes(self, before: Tensor, after: Tensor) -> list[tuple[str, float, float]]:
        """Most likely classes, before or after a change, with both probabilities."""
        count = min(TOP_CLASSES, len(self.classes))
        top = dict.fromkeys([*before.topk(count).indices.tolist(), *after.topk(count).indices.tolist()])
        return [(self.classes[index], round(before[index].item(), 4), round(after[index].item(), 4)) for index in top]


def open_run(run_dir: str | Path, name: str = "") -> AttentionInspector:
    """Inspect the snapshots of a run; `name` defaults to the folder's name.

    Raises FileNotFoundError or ValueError if there are no readable snapshots.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"there is no folder {run_dir}")
    models = [open_model(file) for file in snapshot_files(run_dir)]
    if not models:
        raise FileNotFoundError(f"{run_dir} has no snapshots; pass a run folder of train_cifar.py or train_imagenet.py")
    return AttentionInspector(name or run_dir.name, models, run_dir)


def open_weights(source: str) -> AttentionInspector:
    """Inspect one set of weights: a file, a URL, or a released model. Raises FileNotFoundError or ValueError."""
    model = open_model(source)
    model.epoch = model.epoch or None  # 0: unknown
    return AttentionInspector(model.name, [model])


def open_demos() -> dict[str, AttentionInspector]:
    """The models in demo/, by folder; the first one opens."""
    folder = Path(__file__).parent.parent / "demo"
    return {name: open_run(folder / name, title) for name, title in DEMOS.items()}


def read_json(run_dir: Path | None, name: str) -> dict:
    """The content of a JSON file of a run; empty if it is missing. Raises ValueError if it is damaged."""
    try:
        return json.loads((run_dir / name).read_text()) if run_dir and (run_dir / name).exists() else {}
    except ValueError as error:
        raise ValueError(f"{run_dir.name}/{name} is damaged ({error})") from error


def read_records(run_dir: Path | None) -> list[dict]:
    """The metrics of a run, one record per epoch; none if there are no metrics yet."""
    return analysis.read_metrics(run_dir) if run_dir and (run_dir / "metrics.jsonl").exists() else []
