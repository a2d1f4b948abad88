"""Pictures to keep of what the page shows: a view as PNG, and the heads of a layer over training as a moving GIF.

python -m viewer.figures results/heads.gif --run demo --layer 5          makes the one that opens the README
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
from pictures import open_picture
from viewer.probe import Probe, check_upload, open_run

POSITION, CONTENT = "#d9730d", "#2f6fd0"  # as in panel.css
GATES = LinearSegmentedColormap.from_list("gates", [CONTENT, POSITION])
FRAME, LAST_FRAME = 800, 2400  # milliseconds
drawing = Lock()  # matplotlib is not made for threads


def view(
    probe: Probe,
    picture: dict,
    layer: int,
    checkpoint: int,
    query: int,
    changed: list | None = None,
    recompute: bool = False,
) -> bytes:
    """All heads of a GPSA layer as a PNG: the position, content and mix map of each.

    `picture` comes from probe.picture; `changed` are gates (l h) in place of the model's, to mix its maps with or, with
    `recompute`, to run it with. Raises ValueError.
    """
    with drawing:
        whole = draw(probe, picture, layer, checkpoint, query, ("position", "content", "mixed"), changed, recompute)
    stream = io.BytesIO()
    whole.save(stream, "PNG")
    return stream.getvalue()


def animation(probe: Probe, picture: dict, layer: int, query: int) -> bytes:
    """The mix maps of all heads of a GPSA layer, one checkpoint after another, as a GIF. Raises ValueError."""
    checkpoints = range(len(probe.epochs))
    frames = []
    for checkpoint in checkpoints:
        with drawing:  # for one frame, so that others need not wait for all
            frames.append(draw(probe, picture, layer, checkpoint, query, ("mixed",)))
    palette = frames[-1].quantize(255)  # one for all frames, so that no colour flickers
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    stream, durations = io.BytesIO(), [FRAME] * len(others) + [LAST_FRAME]
    first.save(stream, "GIF", save_all=True, append_images=others, duration=durations, loop=0)
    return stream.getvalue()


def draw(
    probe: Probe,
    picture: dict,
    layer: int,
    checkpoint: int,
    query: int,
    kinds: tuple[str, ...],
    changed: list | None = None,
    recompute: bool = False,
) -> Image.Image:
    """The picture with its query patch, the maps of every head in the layout of the kernel, the gates over epochs."""
    display = base64.b64decode(picture["display"].partition(",")[2])
    check_upload(display)  # it comes back from a browser
    heads = probe.heads(picture["pixels"], layer, checkpoint, query, changed if recompute else None)
    (rows, columns), (height, width) = kernel_shape(probe.config.num_heads), probe.config.grid
    place = query % width, query // width
    wide = len(kinds) > 1
    figure = Figure(figsize=(15, 5.6) if wide else (11.4, 4.4), dpi=90)
    widths = [1, 2.5, 1.1] if wide else [1, 1.1, 1]
    grid = figure.add_gridspec(1, 3, width_ratios=widths, wspace=0.12, left=0.02, right=0.98, top=0.86, bottom=0.1)
    left, middle, right = grid
    epoch = f"epoch {probe.epochs[checkpoint]}" if len(probe.epochs) > 1 else probe.name
    what = "position, content and mix" if wide else "where its heads look from the framed patch"
    title = f"Layer {probe.layers[layer] + 1}, {epoch}{', with other gates' if changed else ''}: {what}"
    figure.suptitle(title, x=0.02, y=0.98, ha="left", fontsize=14, weight="bold")

    shown = figure.add_subplot(left)
    shown.imshow(open_picture(io.BytesIO(display)), extent=(0, width, height, 0))
    frame(shown, place)
    shown.axis("off")

    cells = middle.subgridspec(rows, columns, wspace=0.12, hspace=0.3)
    for index, head in enumerate(heads):
        gate = head["gate"] if changed is None else changed[layer][index]
        position, content = np.array(head["position"]), np.array(head["content"])
        maps = {"position": position, "content": content, "mixed": gate * position + (1 - gate) * content}
        cell = cells[index % rows, index // rows].subgridspec(1, len(kinds), wspace=0.06)
        for column, kind in enumerate(kinds):
            axes = figure.add_subplot(cell[column])
            axes.imshow(maps[kind], cmap="viridis", vmin=0, vmax=max(maps[kind].max(), 4 / (height * width)),
                        extent=(0, width, height, 0))  # fmt: skip
            frame(axes, place)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set(color=GATES(gate), linewidth=4 if len(kinds) == 1 else 2)
            if kind == kinds[0]:
                axes.set_title(f"head {index + 1}: gate {gate:.2f}", fontsize=8, loc="left", pad=4)

    draw_gates(figure.add_subplot(right), probe, layer, checkpoint)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def draw_gates(axes, probe: Probe, layer: int, checkpoint: int):
    """The gate of every head of a layer over the checkpoints, with a line at the one on show."""
    gates = probe.gates()[:, layer].numpy()  # checkpoint, head
    places = np.arange(len(gates))
    for head in gates.T:
        axes.plot(places, head, color=GATES(head[-1]), linewidth=1.6, marker="o", markersize=3)
    axes.axvline(checkpoint, color="0.3", linestyle=":")
    told = range(len(places) - 1, -1, -1 - len(places) // 10)  # more would run into each other
    labels = [epoch if place in told else "" for place, epoch in enumerate(probe.epochs)]
    axes.set(ylim=(-0.02, 1.02), xticks=places, xticklabels=labels, yticks=[0, 0.5, 1], xlabel="epoch")
    axes.set_title("gate of each head: 1 is position, 0 content", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def frame(axes, place: tuple[int, int]):
    """A frame around the query patch, white on black."""
    for colour, width in (("black", 3.5), ("white", 1.5)):
        axes.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor=colour, linewidth=width))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the GIF to write")
    parser.add_argument("--run", type=Path, default=Path("demo"), help="run folder (default: demo)")
    parser.add_argument("--picture", type=Path, default=get_image("cheetah1.jpg"), help="(default: a cheetah)")
    parser.add_argument("--layer", type=int, default=5, help="block, counted from 1 (default: 5)")
    parser.add_argument("--patch", type=int, nargs=2, default=(4, 4), metavar=("ROW", "COLUMN"), help="(default: 4 4)")
    given = parser.parse_args()
    try:
        probe = open_run(given.run)
        picture, layer = probe.picture(Path(given.picture)), probe.layers.index(given.layer - 1)
        query = given.patch[0] * probe.config.grid[1] + given.patch[1]
        given.file.write_bytes(animation(probe, picture, layer, query))
    except (ValueError, OSError) as problem:
        sys.exit(f"viewer.figures: {problem}")


if __name__ == "__main__":
    main()
