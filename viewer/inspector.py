"""A model and a picture in, what the heads look at out: all that the page needs, and nothing of how it looks."""

import base64
import io
import json
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, wraps
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torch.func import functional_call
from torchvision.models import ResNet18_Weights

from analysis import gates, read_metrics, uniform_non_locality
from convit_min import (
    GPSA,
    MODELS,
    ConViT,
    ConViTConfig,
    create_model,
    kernel_shape,
    load_weights,
    normalise,
    read_weights,
)
from pictures import middle, open_picture

MAX_BYTES, MAX_PIXELS = 10 * 2**20, 20_000_000
NO_PICTURE = "This file cannot be read as a picture; please choose a PNG, JPEG, WebP or GIF."
DISPLAY_SIZE = 384  # pixels of the longer side of a picture on the page, at most
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]  # others may start programs, as EPS does
LIKELIEST = 3  # classes shown
CACHE = 2**28  # bytes of content maps to keep in memory: of the demo, about ninety pictures


class Maps(NamedTuple):
    """What one model makes of one picture."""

    content: Tensor  # l h n n, uint8: 255 C / peak, of the GPSA layers
    peak: Tensor  # l h: the largest value of each head's content maps
    probabilities: Tensor  # over the classes


def in_turn(method):
    """A method of Probe that runs in its one thread: two at once would share the cores, and many keep more memory."""

    @wraps(method)
    def wait(self, *arguments):
        return self.thread.submit(method, self, *arguments).result()

    return wait


class Probe:
    """The checkpoints of a model, opened, one after another in training time. Safe to call from many threads."""

    def __init__(self, name: str, classes: list[str], models: list[ConViT], epochs: list[int], run: Path | None = None):
        """For models that are open; `open_run` and `open_weights` open files. Raises ValueError for plain ViTs."""
        self.name, self.classes, self.models, self.epochs, self.run = name, classes, models, epochs, run
        self.config = models[0].config
        self.layers = [index for index, block in enumerate(models[0].blocks) if isinstance(block.attn, GPSA)]
        if not self.layers:
            raise ValueError(f"{name} is a plain ViT: it has no gates to watch")
        self.thread = ThreadPoolExecutor(1)
        size = len(self.layers) * self.config.num_heads * math.prod(self.config.grid) ** 2  # bytes of content maps
        self.maps = lru_cache(maxsize=max(CACHE // size, 2 * len(models)))(self._maps)
        self.flags = run_flags(run) if run else {}

    @in_turn
    def refresh(self):
        """Open the snapshots that a run has written since."""
        gone = self.run is None or not self.run.exists()
        for file in [] if gone else snapshots(self.run)[len(self.models) :]:
            model, record = open_snapshot(file)
            self.models.append(model)
            self.epochs.append(record["epoch"])

    def description(self) -> dict:
        """What does not depend on the picture: shapes, epochs, and every head's gate and v_pos at every checkpoint."""
        rows, columns = kernel_shape(self.config.num_heads)
        models = self.models[: len(self.epochs)]  # refresh may be adding one
        return {
            "name": self.name,
            "grid": self.config.grid,
            "kernel": [rows, columns],
            "layers": self.layers,
            "classes": self.classes,
            "epochs": self.epochs[: len(models)],
            "finished": self.finished(),
            "gate": self.gates()[: len(models)].tolist(),
            "v_pos": [[model.blocks[layer].attn.pos_proj.weight.tolist() for layer in self.layers] for model in models],
            "story": story(self.run, self.name) if self.run else None,
            "uniform": uniform_non_locality(self.config.grid),
            "colours": base64.b64encode(colormaps["viridis"](np.arange(256), bytes=True)[:, :3].tobytes()).decode(),
        }

    def gates(self) -> Tensor:
        """The gate of every head at every checkpoint (t l h)."""
        return torch.stack([gates(model)[self.layers] for model in self.models])

    def finished(self) -> bool:
        """Whether no more snapshots are to come."""
        stretched = self.flags["data_fraction"] if self.flags.get("scale_epochs") else 1
        return self.epochs[-1] >= round(self.flags.get("epochs", 0) / stretched)

    def picture(self, file: Path | bytes) -> dict:
        """A picture for the page: `display` and what the model has `seen`, for <img>; `pixels` for the other methods.

        Raises ValueError, in a sentence for the visitor, where the file is no picture or too large.
        """
        file = file.read_bytes() if isinstance(file, Path) else file
        check_upload(file)
        try:
            picture = open_picture(io.BytesIO(file), enough=2 * DISPLAY_SIZE)
        except ValueError:
            raise ValueError(NO_PICTURE) from None
        seen = middle(picture, *self.config.image_shape)
        rows, columns = self.config.grid
        side = DISPLAY_SIZE // max(rows, columns)  # whole pixels for a patch
        display, exact = io.BytesIO(), io.BytesIO()
        middle(picture, rows * side, columns * side).save(display, "JPEG", quality=90)
        seen.save(exact, "PNG")
        return {
            "display": data_url(display.getvalue(), "image/jpeg"),
            "seen": data_url(exact.getvalue(), "image/png"),
            "pixels": base64.b64encode(seen.tobytes()).decode(),
        }

    def read_layer(self, pixels: str, layer: int) -> dict:
        """Content maps of a GPSA layer at all checkpoints, as bytes of 255 C / peak, and the likeliest classes.

        `pixels` comes from `picture`; `layer` counts the GPSA layers from 0. Raises ValueError for anything else.
        """
        raw = self._raw(pixels, layer)
        maps = [self.maps(raw, checkpoint) for checkpoint in range(len(self.epochs))]
        return {
            "content": [base64.b64encode(one.content[layer].numpy().tobytes()).decode() for one in maps],
            "peaks": [one.peak[layer].tolist() for one in maps],
            "classes": [self._named(one.probabilities, one.probabilities) for one in maps],
        }

    def what_if(self, pixels: str, layer: int, checkpoint: int, changed: list[list[float]]) -> dict:
        """The same of one checkpoint with other gates (l h, 0 to 1), and its likeliest classes before and after."""
        raw = self._raw(pixels, layer)
        before, after = self.maps(raw, checkpoint), self._maps(raw, checkpoint, self._wanted(changed))
        return {
            "content": base64.b64encode(after.content[layer].numpy().tobytes()).decode(),
            "peaks": after.peak[layer].tolist(),
            "classes": self._named(before.probabilities, after.probabilities),
        }

    @in_turn
    def heads(
        self, pixels: str, layer: int, checkpoint: int, query: int, changed: list[list[float]] | None = None
    ) -> list[dict]:
        """What every head of a layer looks at from the patch `query` (rows first), as plain lists Y X.

        `changed` are gates (l h) to run the model with instead of its own.
        """
        raw = self._raw(pixels, layer)
        if query not in range(math.prod(self.config.grid)):
            raise ValueError(f"expected a patch of a grid of {self.config.grid[0]} x {self.config.grid[1]}")
        other = None if changed is None else self._wanted(changed)
        attention = self._forward(raw, checkpoint, other)[1][self.layers[layer]]
        maps = torch.stack([attention.position[:, query], attention.content[0, :, query], attention.mixed[0, :, query]])
        maps = rearrange(maps, "kind h (Y X) -> h kind Y X", Y=self.config.grid[0]).tolist()
        heads = zip(attention.gate.tolist(), maps, strict=True)
        return [{"gate": gate, "position": p, "content": c, "mixed": m} for gate, (p, c, m) in heads]

    def _wanted(self, changed: list[list[float]]) -> Tensor:
        wanted = torch.tensor(changed, dtype=torch.float32)
        if wanted.shape != (len(self.layers), self.config.num_heads) or not ((wanted >= 0) & (wanted <= 1)).all():
            raise ValueError(
                f"expected a gate from 0 to 1 for {len(self.layers)} layers, {self.config.num_heads} heads"
            )
        return wanted

    def _raw(self, pixels: str, layer: int) -> bytes:
        height, width = self.config.image_shape
        raw = base64.b64decode(pixels, validate=True)
        known = isinstance(layer, int) and 0 <= layer < len(self.layers)
        if len(raw) != 3 * height * width or not known:
            raise ValueError(f"expected {width} x {height} pixels and a layer from 0 to {len(self.layers) - 1}")
        return raw

    @in_turn
    def _maps(self, raw: bytes, checkpoint: int, changed: Tensor | None = None) -> Maps:
        logits, attention = self._forward(raw, checkpoint, changed)
        content = torch.stack([attention[layer].content[0] for layer in self.layers])  # l h n n
        peak = content.amax(dim=(2, 3))
        return Maps((255 * content / peak[..., None, None]).round().byte(), peak, logits[0].softmax(dim=0))

    @torch.inference_mode()
    def _forward(self, raw: bytes, checkpoint: int, changed: Tensor | None = None) -> tuple[Tensor, list]:
        """Logits and attention of one model, if asked with other gates (l h)."""
        if checkpoint not in range(len(self.epochs)):
            raise ValueError(f"expected a checkpoint from 0 to {len(self.epochs) - 1}")
        pixels = np.frombuffer(raw, dtype=np.uint8).reshape(*self.config.image_shape, 3)
        image = normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
        names = [f"blocks.{layer}.attn.gating_param" for layer in self.layers]
        other = {} if changed is None else dict(zip(names, changed.logit(eps=1e-6), strict=True))
        return functional_call(self.models[checkpoint], other, (image,), {"return_attention": True})

    def _named(self, before: Tensor, after: Tensor) -> list[tuple[str, float, float]]:
        """The likeliest classes, before or after, each with both of its probabilities."""
        count = min(LIKELIEST, len(self.classes))
        chosen = list(dict.fromkeys([*before.topk(count).indices.tolist(), *after.topk(count).indices.tolist()]))
        return [
            (self.classes[index], round(before[index].item(), 4), round(after[index].item(), 4)) for index in chosen
        ]


def open_run(run: Path, name: str | None = None) -> Probe:
    """The snapshots of a run folder, by another name if given.

    Raises FileNotFoundError or ValueError, in one sentence, where there are none.
    """
    models, records = zip(*map(open_snapshot, snapshots(run)), strict=True)
    return Probe(name or run.name, records[-1]["classes"], list(models), [record["epoch"] for record in records], run)


def open_weights(source: str) -> Probe:
    """Released weights by name, or a file that load_weights reads, as one checkpoint.

    Raises FileNotFoundError or ValueError, in one sentence, where that cannot be.
    """
    try:
        model, record = open_snapshot(Path(source))  # our own files say what they are
        return Probe(Path(source).stem, record["classes"], [model], [record["epoch"]])
    except ValueError:
        state, _ = read_weights(source)
    try:
        count = state["head.weight"].shape[0]
        shape = (state["pos_embed"].shape[-1], len(state["blocks.0.attn.gating_param"]))
        name = next(name for name, config in MODELS.items() if (config.dim, config.num_heads) == shape)
    except (KeyError, StopIteration):
        raise ValueError(f"{source} holds no ConViT of a size in convit_min.MODELS") from None
    model = create_model(name, num_classes=count).eval()
    load_weights(model, source)
    known = ResNet18_Weights.DEFAULT.meta["categories"]  # ImageNet's, in its order
    return Probe(name, known if count == len(known) else [f"class {index}" for index in range(count)], [model], [0])


def snapshots(run: Path) -> list[Path]:
    """The snapshot files of a run folder, the earliest first. Raises FileNotFoundError where there are none."""
    files = sorted((run / "snapshots").glob("epoch_*.pt"))
    if not files:
        raise FileNotFoundError(f"{run} holds no snapshots; give a run folder of train_cifar.py with --run")
    return files


def open_snapshot(file: Path) -> tuple[ConViT, dict]:
    """A model, ready to use, and its epoch and classes. Raises ValueError for a file that is no snapshot."""
    try:
        record = torch.load(file, map_location="cpu", weights_only=True)
        model = ConViT(ConViTConfig(**record["model_config"])).eval()
        model.load_state_dict(record["model"])
        return model, {"epoch": int(record["epoch"]), "classes": [str(name) for name in record["classes"]]}
    except Exception as error:  # damaged files make the unpickler raise nearly anything
        raise ValueError(f"{file} is no snapshot of train_cifar.py, or is damaged") from error


def run_flags(run: Path) -> dict:
    """The flags that a run was trained with; none where its config.json is missing or damaged."""
    try:
        flags = json.loads((run / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return flags if isinstance(flags, dict) else {}


def story(run: Path, name: str) -> dict | None:
    """How a run went, an item an epoch; gates and non-locality by layer and head. None for a run without metrics."""
    lines = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    if not lines:
        return None
    heads = {name: [line["heads"][name] for line in lines] for name in ("gate", "non_locality")}
    numbers = {name: [line.get(name) for line in lines] for name in ("test_accuracy", "test_loss", "train_loss")}
    return {"name": name, "epochs": [line["epoch"] for line in lines]} | heads | numbers


def check_upload(file: bytes):
    """Raise ValueError, in a sentence for the visitor, where a file is no picture or too large to open safely."""
    if len(file) > MAX_BYTES:
        raise ValueError("This file is larger than 10 MB; please choose a smaller picture.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a bomb that is below Pillow's limit and above ours
            with Image.open(io.BytesIO(file), formats=FORMATS) as picture:
                pixels = picture.width * picture.height
    except Image.DecompressionBombError:
        pixels = MAX_PIXELS + 1
    except Exception:  # a decoder raises nearly anything on a damaged picture
        raise ValueError(NO_PICTURE) from None
    if pixels > MAX_PIXELS:
        raise ValueError("This picture has more than 20 million pixels; please choose a smaller one.")


def data_url(file: bytes, kind: str) -> str:
    """A file as the address of an <img>; `kind` is its media type."""
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"
