"""Exports what the page shows: a layer's heads as a PNG, or over training as an animated GIF.

python -m viewer.export results/heads.gif --run demo --layer 5          writes the animation in the README
"""

import argparse
import base64
import io
import sys
from pathlib import Path
from threading import Lock

import numpy as np
from gradio.media import get_image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from convit_min import kernel_shape
from images import load_image
from viewer.inspector import AttentionInspector, check_upload, encode_image, open_run

POSITION, CONTENT = "#d9730d", "#2f6fd0"  # as in page.css
GATE_COLORS = LinearSegmentedColormap.from_list("gates", [CONTENT, POSITION])
FRAME_MS, LAST_FRAME_MS = 800, 2400
draw_lock = Lock()  # matplotlib is not thread-safe


def render_png(
    inspector: AttentionInspector,
    image: dict,
    layer: int,
    snapshot: int,
    query: int,
    gates: list | None = None,
    recompute: bool = False,
) -> bytes:
    """Position, content, and mixed maps of every head of a GPSA layer, as a PNG.

    `image` comes from inspector.prepare_image. `gates` (l h) replace the trained ones: they mix the model's maps, or,
    with `recompute`, the model runs with them. Raises ValueError for invalid arguments.
    """
    kinds = ("position", "content", "mixed")
    with draw_lock:
        figure = draw_heads(inspector, image, layer, snapshot, query, kinds, gates, recompute)
    return encode_image(figure, "PNG")


def render_gif(inspector: AttentionInspector, image: dict, layer: int, query: int) -> bytes:
    """Mixed maps of every head of a GPSA layer, one frame per snapshot. Raises ValueError for invalid arguments."""
    frames = []
    for snapshot in range(len(inspector.epochs)):
        with draw_lock:  # per frame, so that other requests need not wait for the whole animation
            frames.append(draw_heads(inspector, image, layer, snapshot, query, ("mixed",)))
    palette = frames[-1].quantize(255)  # shared, so that colors do not flicker
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    durations = [FRAME_MS] * len(others) + [LAST_FRAME_MS]
    return encode_image(first, "GIF", save_all=True, append_images=others, duration=durations, loop=0)


def draw_heads(
    inspector: AttentionInspector,
    image: dict,
    layer: int,
    snapshot: int,
    query: int,
    kinds: tuple[str, ...],
    gates: list | None = None,
    recompute: bool = False,
) -> Image.Image:
    """The image with its query patch, every head's maps of these kinds in kernel layout, and the gates over epochs."""
    display = base64.b64decode(image["display"].partition(",")[2])
    check_upload(display)  # the browser sends it back
    heads = inspector.head_maps(image["pixels"], layer, snapshot, query, gates if recompute else None)
    kernel_rows, kernel_columns = kernel_shape(inspector.config.num_heads)
    rows, columns = inspector.config.grid
    query_corner = query % columns, query // columns

    all_kinds = len(kinds) > 1
    figure = Figure(figsize=(15, 5.6) if all_kinds else (11.4, 4.4), dpi=90)
    left, center, right = figure.add_gridspec(
        1, 3, width_ratios=[1, 2.5, 1.1] if all_kinds else [1, 1.1, 1],
        wspace=0.12, left=0.02, right=0.98, top=0.86, bottom=0.1)  # fmt: skip
    epoch_label = f"epoch {inspector.epochs[snapshot]}" if len(inspector.epochs) > 1 else inspector.name
    description = "position, content, and mixed maps" if all_kinds else "what each head attends to from the query patch"
    changed = ", gates changed by hand" if gates else ""
    title = f"Layer {inspector.layers[layer] + 1}, {epoch_label}{changed}: {description}"
    figure.suptitle(title, x=0.02, y=0.98, ha="left", fontsize=14, weight="bold")

    image_axes = figure.add_subplot(left)
    image_axes.imshow(load_image(io.BytesIO(display)), extent=(0, columns, rows, 0))
    draw_frame(image_axes, query_corner)
    image_axes.axis("off")

    cells = center.subgridspec(kernel_rows, kernel_columns, wspace=0.12, hspace=0.3)
    for index, head in enumerate(heads):
        maps = {kind: np.array(head[kind]) for kind in ("position", "content")}
        gate = head["gate"] if gates is None else gates[layer][index]
        maps["mixed"] = gate * maps["position"] + (1 - gate) * maps["content"]
        cell = cells[index % kernel_rows, index // kernel_rows].subgridspec(1, len(kinds), wspace=0.06)
        for column, kind in enumerate(kinds):
            axes = figure.add_subplot(cell[column])
            scale = max(maps[kind].max(), 4 / (rows * columns))  # as on the page: flat maps stay dark
            axes.imshow(maps[kind], cmap="viridis", vmin=0, vmax=scale, extent=(0, columns, rows, 0))
            draw_frame(axes, query_corner)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=GATE_COLORS(gate), linewidth=2 if all_kinds else 4)
            if column == 0:
                axes.set_title(f"head {index + 1}: gate {gate:.2f}", fontsize=8, loc="left", pad=4)

    draw_gates(figure.add_subplot(right), inspector, layer, snapshot)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def draw_gates(axes, inspector: AttentionInspector, layer: int, snapshot: int):
    """Gate of every head of a layer over the snapshots, with a line at the current one."""
    gates = inspector.gate_history()[:, layer].numpy()  # s h
    ticks = np.arange(len(gates))
    for head in gates.T:
        axes.plot(ticks, head, color=GATE_COLORS(head[-1]), linewidth=1.6, marker="o", markersize=3)
    axes.axvline(snapshot, color="0.3", linestyle=":")
    labeled = range(len(ticks) - 1, -1, -1 - len(ticks) // 10)  # more labels would overlap
    labels = [epoch if tick in labeled else "" for tick, epoch in enumerate(inspector.epochs)]
    axes.set(ylim=(-0.02, 1.02), xticks=ticks, xticklabels=labels, yticks=[0, 0.5, 1], xlabel="epoch")
    axes.set_title("gate of each head (1: position, 0: content)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def draw_frame(axes, corner: tuple[int, int]):
    """Frame the query patch, white on black."""
    for color, width in (("black", 3.5), ("white", 1.5)):
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=color, linewidth=width))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="GIF to write")
    parser.add_argument("--run", type=Path, default=Path("demo"), help="run folder (default: demo)")
    parser.add_argument("--image", type=Path, default=Path(get_image("cheetah1.jpg")), help="(default: a cheetah)")
    parser.add_argument("--layer", type=int, default=5, help="transformer block, counted from 1 (default: 5)")
    parser.add_argument("--patch", type=int, nargs=2, default=(4, 4), metavar=("ROW", "COLUMN"), help="(default: 4 4)")
    args = parser.parse_args()
    try:
        inspector = open_run(args.run)
        layer = inspector.layers.index(args.layer - 1)
        query = args.patch[0] * inspector.config.grid[1] + args.patch[1]
        args.file.write_bytes(render_gif(inspector, inspector.prepare_image(args.image), layer, query))
    except (ValueError, OSError) as error:
        sys.exit(f"viewer.export: {error}")


if __name__ == "__main__":
    main()
