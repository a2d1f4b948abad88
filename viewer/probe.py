"""A run and a picture in, what the heads look at out: all that the page needs to know, and nothing of how it looks."""

import base64
import io
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image

from analysis import gates, read_metrics
from convit_min import GPSA, ConViT, ConViTConfig, kernel_shape, normalise
from pictures import middle, open_picture

MAX_BYTES, MAX_PIXELS = 10 * 2**20, 20_000_000
NO_PICTURE = "This file cannot be read as a picture; please choose a PNG, JPEG, WebP or GIF."
DISPLAY_SIZE = 384  # side of the picture on the page, in pixels


class Probe:
    """All snapshots of a run, opened. Raises FileNotFoundError or ValueError, in one sentence, where there are none."""

    def __init__(self, run: str | Path):
        run = Path(run)
        files = sorted((run / "snapshots").glob("epoch_*.pt"))
        if not files:
            raise FileNotFoundError(f"{run} holds no snapshots; give a run folder of train_cifar.py with --run")
        self.models, self.epochs, self.classes = [], [], []
        for file in files:
            model, record = open_snapshot(file)
            self.models.append(model)
            self.epochs.append(record["epoch"])
            self.classes = record["classes"]
        self.config = self.models[-1].config
        self.layers = [index for index, block in enumerate(self.models[-1].blocks) if isinstance(block.attn, GPSA)]
        if not self.layers:
            raise ValueError(f"{run} is a plain ViT: it has no gates to watch")
        self.metrics = read_metrics(run)
        self._content_maps = lru_cache(maxsize=16)(self._content_maps)  # one visitor goes through all layers

    def description(self) -> dict:
        """What does not depend on the picture: shapes, epochs, and every head's gate and v_pos at every checkpoint."""
        rows, columns = kernel_shape(self.config.num_heads)
        measured = {line["epoch"]: line for line in self.metrics}
        return {
            "grid": self.config.grid,
            "kernel": [rows, columns],
            "layers": self.layers,
            "classes": self.classes,
            "epochs": self.epochs,
            "accuracy": [measured[epoch]["test_accuracy"] if epoch in measured else None for epoch in self.epochs],
            "gate": torch.stack([gates(model)[self.layers] for model in self.models]).tolist(),
            "v_pos": [
                [model.blocks[layer].attn.pos_proj.weight.tolist() for layer in self.layers] for model in self.models
            ],
            "gate_curves": {
                "epochs": list(measured),
                "gates": [[line["heads"]["gate"][layer] for layer in self.layers] for line in self.metrics],
            },
            "colours": base64.b64encode(colormaps["viridis"](np.arange(256), bytes=True)[:, :3].tobytes()).decode(),
        }

    def picture(self, file: str | Path) -> dict:
        """A picture for the page: `display` and what the model has `seen`, for <img>; `pixels` for read_layer.

        Raises ValueError, in a sentence for the visitor, where the file is no picture or too large.
        """
        check_upload(Path(file))
        try:
            picture = open_picture(Path(file))
        except ValueError:
            raise ValueError(NO_PICTURE) from None
        height, width = self.config.image_shape
        seen = middle(picture, height, width)
        scale = DISPLAY_SIZE / max(height, width)
        shown = middle(picture, round(height * scale), round(width * scale))
        return {
            "display": _data_url(shown),
            "seen": _data_url(seen),
            "pixels": base64.b64encode(seen.tobytes()).decode(),
        }

    def read_layer(self, pixels: str, layer: int) -> dict:
        """Content maps of a GPSA layer at all checkpoints, as bytes of 255 A / peak, and the three likeliest classes.

        `pixels` comes from `picture`; `layer` counts the GPSA layers from 0. Raises ValueError for anything else.
        """
        height, width = self.config.image_shape
        raw = base64.b64decode(pixels, validate=True)
        known = isinstance(layer, int) and 0 <= layer < len(self.layers)
        if len(raw) != 3 * height * width or not known:
            raise ValueError(f"expected {width} x {height} pixels and a layer from 0 to {len(self.layers) - 1}")
        content, peaks, classes = self._content_maps(raw)
        return {
            "content": [base64.b64encode(maps[layer].numpy().tobytes()).decode() for maps in content],
            "peaks": [peak[layer].tolist() for peak in peaks],
            "classes": classes,
        }

    @torch.inference_mode()
    def _content_maps(self, raw: bytes) -> tuple[list, list, list]:
        height, width = self.config.image_shape
        pixels = np.frombuffer(raw, dtype=np.uint8).reshape(height, width, 3)
        image = normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
        content, peaks, classes = [], [], []
        for model in self.models:
            logits, attention = model(image, return_attention=True)
            maps = torch.stack([attention[layer].content[0] for layer in self.layers])  # l h n n
            peak = maps.amax(dim=(2, 3))
            content.append((255 * maps / peak[..., None, None]).round().byte())
            peaks.append(peak)
            shares, indices = logits[0].softmax(dim=0).topk(min(3, len(self.classes)))
            likeliest = zip(shares.tolist(), indices.tolist(), strict=True)
            classes.append([[self.classes[index], round(share, 4)] for share, index in likeliest])
        return content, peaks, classes


def open_snapshot(file: Path) -> tuple[ConViT, dict]:
    """A model, ready to use, and the record that it came in. Raises ValueError for a file that is no snapshot."""
    try:
        record = torch.load(file, map_location="cpu", weights_only=True)
        model = ConViT(ConViTConfig(**record["model_config"])).eval()
        model.load_state_dict(record["model"])
        return model, {"epoch": int(record["epoch"]), "classes": [str(name) for name in record["classes"]]}
    except Exception as error:  # damaged files make the unpickler raise nearly anything
        raise ValueError(f"{file} is no snapshot of train_cifar.py, or is damaged") from error


def check_upload(file: Path):
    """Raise ValueError, in a sentence for the visitor, where a file is no picture or too large to open safely."""
    if file.stat().st_size > MAX_BYTES:
        raise ValueError("This file is larger than 10 MB; please choose a smaller picture.")
    try:
        with Image.open(file) as picture:
            pixels = picture.width * picture.height
    except Image.DecompressionBombError:
        pixels = MAX_PIXELS + 1
    except Exception:  # a decoder raises nearly anything on a damaged picture
        raise ValueError(NO_PICTURE) from None
    if pixels > MAX_PIXELS:
        raise ValueError("This picture has more than 20 million pixels; please choose a smaller one.")


def _data_url(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
