"""Exports what the page shows: a head and its layer as a PNG, or over training as an animated GIF.

From the shell, it makes the GIF of a run:

    python -m viewer.export heads.gif --run runs/cifar --image cat.jpg --layer 4 --head 5
"""

import argparse
import base64
import sys
from pathlib import Path
from threading import Lock

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from analysis import check_index
from convit_min import ConViT, kernel_shape
from viewer.inspector import DISPLAY_SIZE, AttentionInspector, open_run, read_records, worker
from viewer.limits import encode_image, load_upload

POSITION, CONTENT = "#d9730d", "#2f6fd0"  # as in page.css
GATE_COLORS = LinearSegmentedColormap.from_list("gates", [CONTENT, POSITION])
COLORS_ON_IMAGE = LinearSegmentedColormap.from_list("on image", ["#4a90ff", "#ff8c1a"])  # brighter, as in hero.js
LINE_WIDTH = 22  # points of attention weight 1
FRAME_MS, LAST_FRAME_MS = 900, 3000
draw_lock = Lock()  # matplotlib is not thread-safe


def export_view(inspector: AttentionInspector, view: dict, animated: bool) -> bytes:
    """A PNG of a view, or an animated GIF of it with a frame per snapshot.

    `view` is an image from inspector.prepare_image with the additional keys `layer`, `head`, `query` (a patch),
    `snapshot` (of the PNG), and `gates` (those of inspector.recompute, or None). Raises ValueError if they are invalid.
    """
    frames = []
    for snapshot in range(len(inspector.models)) if animated else [view["snapshot"]]:
        with draw_lock:  # per frame, so that other requests need not wait for the whole animation
            frames.append(draw_view(inspector, view | {"snapshot": snapshot}))
    if not animated:
        return encode_image(frames[0], "PNG")
    palette = frames[-1].quantize(255)  # shared, so that colors do not flicker
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    durations = [FRAME_MS] * len(others) + [LAST_FRAME_MS]
    return encode_image(first, "GIF", save_all=True, append_images=others, duration=durations, loop=0)


def draw_view(inspector: AttentionInspector, view: dict) -> Image.Image:
    """One frame: the image with the head's attention as lines, the layer's heads in kernel layout, and the gates."""
    display = load_upload(base64.b64decode(view["display"].partition(",")[2]), DISPLAY_SIZE)
    display.thumbnail((DISPLAY_SIZE, DISPLAY_SIZE))  # the browser sends it back: it may be larger
    pixels = np.asarray(display) / 255
    layer, head, query, gates, snapshot = (view[name] for name in ("layer", "head", "query", "gates", "snapshot"))
    heads = inspector.head_maps(view["pixels"], layer, snapshot, query, gates)
    check_index("head", head + 1, 1, len(heads))
    epoch = inspector.models[snapshot].epoch
    accuracy = {record["epoch"]: record.get("test_accuracy") for record in read_records(inspector.run_dir)}.get(epoch)

    figure = Figure(figsize=(11.4, 4.3), dpi=90)
    left, center, right = figure.add_gridspec(
        1, 3, width_ratios=[1.1, 1, 0.9], wspace=0.1, left=0.015, right=0.985, top=0.86, bottom=0.11)  # fmt: skip
    moment = inspector.name if epoch is None else f"epoch {epoch}"
    measured = "" if accuracy is None else f": accuracy {accuracy:.0f}%"
    title = moment + (" (gates changed by hand)" if gates else measured)
    figure.suptitle(title, x=0.015, y=0.98, ha="left", fontsize=15, weight="bold")
    axes = figure.add_subplot(left)
    draw_lines(axes, query, *draw_map(axes, 0.75 * pixels, heads[head], query, opacity=0.4))
    axes.set_title(f"where the framed patch looks: layer {layer + 1}, head {head + 1}", fontsize=10, loc="left")

    rows, columns = kernel_shape(len(heads))
    cells = center.subgridspec(rows, columns, wspace=0.1, hspace=0.3)
    gray = 0.45 * pixels[::4, ::4].mean(axis=2, keepdims=True).repeat(3, axis=2)
    for index, maps in enumerate(heads):
        axes = figure.add_subplot(cells[index % rows, index // rows])
        axes.set_title(f"head {index + 1}", fontsize=9, pad=3, weight="bold" if index == head else "normal")
        draw_map(axes, gray, maps, query)
        for spine in axes.spines.values():
            spine.set(color=GATE_COLORS(maps["gate"]), linewidth=5 if index == head else 2.5)
    if layer in inspector.config.gpsa_blocks:
        draw_gates(figure.add_subplot(right), inspector.models, layer, head, snapshot, gates and gates[layer])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def draw_map(axes, background: np.ndarray, maps: dict, query: int, opacity: float = 1):
    """A head's mixed map over an image in 0..1 (H W 3), with the query patch.

    Returns the attention weights (Y X) and their colors (Y X 3): orange where they come from position, else blue.
    """
    weights = np.array(maps["mixed"])
    share = maps["gate"] * np.array(maps["position"] or 0 * weights) / np.maximum(weights, 1e-9)
    colors = COLORS_ON_IMAGE(2.5 * share - 0.75)[..., :3]  # sharpened, as in hero.js
    rows, columns = weights.shape
    scale = max(weights.max(), 4 / weights.size)  # as on the page: flat maps stay dark
    overlay = np.dstack([colors, opacity * np.sqrt(weights / scale)])
    for pixels, interpolation in ((background, "bilinear"), (overlay, "nearest")):
        axes.imshow(pixels, extent=(0, columns, rows, 0), interpolation=interpolation)
    for color, width in (("black", 3.5), ("white", 1.5)):
        axes.add_patch(Rectangle((query % columns, query // columns), 1, 1, fill=False, edgecolor=color, lw=width))
    axes.set(xticks=[], yticks=[], xlim=(0, columns), ylim=(rows, 0))
    return weights, colors


def draw_lines(axes, query: int, weights: np.ndarray, colors: np.ndarray):
    """Lines from the query patch, as wide as the attention weights."""
    columns = weights.shape[1]
    for key in np.argsort(weights, axis=None):
        weight, color = weights.flat[key], colors.reshape(-1, 3)[key]
        if weight > 1.25 / weights.size:
            line = np.array([(patch % columns + 0.5, patch // columns + 0.5) for patch in (query, key)]).T
            width = max(LINE_WIDTH * weight, 0.8)
            axes.plot(*line, color="black", alpha=0.6, lw=width + 2, solid_capstyle="round")
            axes.plot(*line, color=color, lw=width, marker="o", ms=width + 2, markevery=[1], solid_capstyle="round")


def draw_gates(axes, models: list[ConViT], layer: int, head: int, snapshot: int, changed: list | None):
    """Gate of every head of a layer over the epochs, on a logarithmic scale as on the page; crosses: changed gates."""
    epochs = [model.epoch for model in models]
    x = np.log1p([epoch or 0 for epoch in epochs])
    gates = np.array(worker.submit(lambda: [model.blocks[layer].attn.gate().tolist() for model in models]).result())
    for index, values in enumerate(gates.T):
        axes.plot(x, values, color=GATE_COLORS(values[-1]), lw=3.5 if index == head else 1.3, marker="o", ms=3)
    for gate in changed or ():
        if gate is not None:
            axes.plot(x[snapshot], gate, "x", color="black", ms=9, mew=2, clip_on=False)
    axes.axvline(x[snapshot], color="0.3", linestyle=":")
    labels, left = [], np.inf  # the last tick, and those before it that do not overlap
    for tick, epoch in zip(x[::-1], epochs[::-1], strict=True):
        fits = left - tick > 0.08 * max(x[-1], 1)
        labels, left = [*labels, "" if epoch is None or not fits else epoch], tick if fits else left
    axes.set(ylim=(-0.02, 1.02), xticks=x, xticklabels=labels[::-1], yticks=[0, 0.5, 1], xlabel="epoch")
    axes.set_title("gates of this layer", fontsize=10, loc="left")
    for y, text, color in ((0.95, "position", POSITION), (0.05, "content", CONTENT)):
        axes.text(x[0], y, text, color=color, fontsize=9, weight="bold", va="center")
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
        (row, column), (rows, columns) = args.patch, inspector.config.grid
        check_index("row", row, 1, rows)
        check_index("column", column, 1, columns)
        patch = (row - 1) * columns + column - 1
        view = inspector.prepare_image(args.image.read_bytes())
        view |= {"layer": args.layer - 1, "head": args.head - 1, "query": patch, "gates": None}
        args.file.write_bytes(export_view(inspector, view, animated=True))
    except (ValueError, OSError) as error:
        sys.exit(f"viewer.export: {error}")


if __name__ == "__main__":
    main()
