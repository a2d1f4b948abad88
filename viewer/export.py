"""Exports what the page shows: a head and its layer as a PNG, or over training as an animated GIF.

python -m viewer.export heads.gif --run runs/cifar --image cat.jpg --layer 4 --head 5
"""

import argparse
import base64
import sys
from pathlib import Path
from threading import Lock

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from convit_min import kernel_shape
from viewer.inspector import DISPLAY_SIZE, AttentionInspector, encode_image, open_run
from viewer.limits import load_upload

POSITION, CONTENT = "#d9730d", "#2f6fd0"  # as in page.css
GATE_COLORS = LinearSegmentedColormap.from_list("gates", [CONTENT, POSITION])
ON_IMAGE = np.array([(74, 144, 255), (255, 140, 26)]) / 255  # content and position, as in hero.js
LINE_WIDTH = 22  # points of attention weight 1
FRAME_MS, LAST_FRAME_MS = 900, 3000
draw_lock = Lock()  # matplotlib is not thread-safe


def render_png(
    inspector: AttentionInspector, image: dict, layer: int, head: int, query: int, gates: list | None, snapshot: int
) -> bytes:
    """Where a query patch looks by one head and by all heads of its layer, and the layer's gates, as a PNG.

    `image` comes from inspector.prepare_image; `gates` (l h, or None) replace the trained ones where they are not None.
    Raises ValueError for invalid arguments.
    """
    with draw_lock:
        return encode_image(draw_view(inspector, image, layer, head, query, gates, snapshot), "PNG")


def render_gif(
    inspector: AttentionInspector, image: dict, layer: int, head: int, query: int, gates: list | None = None
) -> bytes:
    """The same as an animated GIF, one frame per snapshot."""
    frames = []
    for snapshot in range(len(inspector.epochs)):
        with draw_lock:  # per frame, so that other requests need not wait for the whole animation
            frames.append(draw_view(inspector, image, layer, head, query, gates, snapshot))
    palette = frames[-1].quantize(255)  # shared, so that colors do not flicker
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    durations = [FRAME_MS] * len(others) + [LAST_FRAME_MS]
    return encode_image(first, "GIF", save_all=True, append_images=others, duration=durations, loop=0)


def draw_view(
    inspector: AttentionInspector, image: dict, layer: int, head: int, query: int, gates: list | None, snapshot: int
) -> Image.Image:
    """One frame: the image with the head's attention as lines, the layer's heads in kernel layout, and the gates."""
    display = base64.b64decode(image["display"].partition(",")[2])
    pixels = np.asarray(load_upload(display, DISPLAY_SIZE)) / 255  # the browser sends it back
    heads = inspector.head_maps(image["pixels"], layer, snapshot, query, gates)
    if head not in range(len(heads)):
        raise ValueError(f"expected a head from 0 to {len(heads) - 1}")
    history = inspector.describe()
    epoch, name = inspector.epochs[snapshot], f"layer {layer + 1}, head {head + 1}"
    accuracy = dict(zip(*(history["curves"][key] for key in ("epochs", "test_accuracy")), strict=True)).get(epoch) \
        if history["curves"] else None  # fmt: skip

    figure = Figure(figsize=(11.4, 4.3), dpi=90)
    left, center, right = figure.add_gridspec(
        1, 3, width_ratios=[1.1, 1, 0.9], wspace=0.1, left=0.015, right=0.985, top=0.86, bottom=0.11)  # fmt: skip
    moment = inspector.name if epoch is None else f"epoch {epoch}"
    changed = " (gates changed by hand)" if gates else ""
    measured = "" if accuracy is None or gates else f": test accuracy {accuracy:.0f}%"
    figure.suptitle(f"{moment}{measured}{changed}", x=0.015, y=0.98, ha="left", fontsize=15, weight="bold")
    draw_hero(figure.add_subplot(left), pixels, heads[head], query, f"where the framed patch looks: {name}")

    kernel_rows, kernel_columns = kernel_shape(len(heads))
    cells = center.subgridspec(kernel_rows, kernel_columns, wspace=0.1, hspace=0.3)
    for index, maps in enumerate(heads):
        axes = figure.add_subplot(cells[index % kernel_rows, index // kernel_rows])
        axes.set_title(f"head {index + 1}", fontsize=9, pad=3, weight="bold" if index == head else "normal")
        draw_map(axes, pixels[::4, ::4], maps, query)
        for spine in axes.spines.values():
            spine.set(color=GATE_COLORS(maps["gate"]), linewidth=5 if index == head else 2.5)
    if history["gate"][0][layer]:
        history["gate"] = [layers[layer] for layers in history["gate"]]
        draw_gates(figure.add_subplot(right), history, head, snapshot, gates and gates[layer])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def hues(maps: dict) -> tuple[np.ndarray, np.ndarray]:
    """Mixed weights of a head (Y X), and their colors (Y X 3): orange where they come from position, else blue."""
    mixed = np.array(maps["mixed"])
    share = maps["gate"] * np.array(maps["position"] or 0 * mixed) / np.maximum(mixed, 1e-9)
    share = np.clip(2.5 * share - 0.75, 0, 1)[..., None]  # sharpened, as in hero.js
    return mixed, (1 - share) * ON_IMAGE[0] + share * ON_IMAGE[1]


def draw_map(axes, pixels: np.ndarray, maps: dict, query: int, dim: float = 0.45, gray: bool = True):
    """A head's mixed map over the dimmed image, with the query patch."""
    weights, colors = hues(maps)
    rows, columns = weights.shape
    background = dim * (pixels.mean(axis=2, keepdims=True).repeat(3, axis=2) if gray else pixels)
    scale = max(weights.max(), 4 / weights.size)  # as on the page: flat maps stay dark
    overlay = np.dstack([colors, np.sqrt(weights / scale) * (1 if gray else 0.4)])
    for layer in (background, overlay):
        axes.imshow(layer, extent=(0, columns, rows, 0), interpolation="nearest" if layer is overlay else "bilinear")
    for color, width in (("black", 3.5), ("white", 1.5)):
        axes.add_patch(Rectangle((query % columns, query // columns), 1, 1, fill=False, edgecolor=color, lw=width))
    axes.set(xticks=[], yticks=[], xlim=(0, columns), ylim=(rows, 0))


def draw_hero(axes, pixels: np.ndarray, maps: dict, query: int, title: str):
    """The image with lines from the query patch, as wide as the attention weights."""
    draw_map(axes, pixels, maps, query, dim=0.75, gray=False)
    weights, colors = hues(maps)
    columns = weights.shape[1]
    for key in np.argsort(weights, axis=None):
        weight, color = weights.flat[key], colors.reshape(-1, 3)[key]
        if weight > 1.25 / weights.size:
            line = np.array([(patch % columns + 0.5, patch // columns + 0.5) for patch in (query, key)]).T
            width = max(LINE_WIDTH * weight, 0.8)
            axes.plot(*line, color="black", alpha=0.6, lw=width + 2, solid_capstyle="round")
            axes.plot(*line, color=color, lw=width, marker="o", ms=width + 2, markevery=[1], solid_capstyle="round")
    axes.set_title(title, fontsize=10, loc="left")


def draw_gates(axes, history: dict, head: int, snapshot: int, changed: list | None):
    """Gate of every head of a layer over the epochs, on a logarithmic scale as on the page; crosses: changed gates."""
    x, gates = np.log1p([epoch or 0 for epoch in history["epochs"]]), np.array(history["gate"])
    for index, values in enumerate(gates.T):
        chosen = index == head
        axes.plot(x, values, color=GATE_COLORS(values[-1]), lw=3.5 if chosen else 1.3, marker="o", ms=3)
    for gate in changed or ():
        if gate is not None:
            axes.plot(x[snapshot], gate, "x", color="black", ms=9, mew=2, clip_on=False)
    axes.axvline(x[snapshot], color="0.3", linestyle=":")
    labels, left = [], np.inf  # the last tick, and those before it that do not overlap
    for tick, epoch in zip(x[::-1], history["epochs"][::-1], strict=True):
        fits = left - tick > 0.08 * max(x[-1], 1)
        labels, left = [*labels, "" if epoch is None or not fits else epoch], tick if fits else left
    axes.set(ylim=(-0.02, 1.02), xticks=x, xticklabels=labels[::-1], yticks=[0, 0.5, 1], xlabel="epoch")
    axes.set_title("gates of this layer", fontsize=10, loc="left")
    for y, text, color in ((1, "position", POSITION), (0, "content", CONTENT)):
        axes.text(x[0], abs(y - 0.05), text, color=to_rgb(color), fontsize=9, weight="bold", va="center")
    axes.spines[["top", "right"]].set_visible(False)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="GIF to write")
    parser.add_argument("--run", type=Path, default=Path("demo/patterns"), help="run folder (default: %(default)s)")
    parser.add_argument("--image", type=Path, required=True, help="image file")
    counted = "counted from 1 (default: %(default)s)"
    parser.add_argument("--layer", type=int, default=1, help=f"transformer block, {counted}")
    parser.add_argument("--head", type=int, default=1, help=f"attention head, {counted}")
    parser.add_argument("--patch", type=int, nargs=2, default=(1, 1), metavar=("ROW", "COLUMN"), help=counted)
    args = parser.parse_args()
    try:
        inspector = open_run(args.run)
        row, column = args.patch
        query = (row - 1) * inspector.config.grid[1] + column - 1
        image = inspector.prepare_image(args.image)
        args.file.write_bytes(render_gif(inspector, image, args.layer - 1, args.head - 1, query))
    except (ValueError, OSError) as error:
        sys.exit(f"viewer.export: {error}")


if __name__ == "__main__":
    main()
