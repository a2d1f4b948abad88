"""Interactive viewer: watch the heads of a ConViT escape locality.

    python app.py                            opens demo/ on http://127.0.0.1:7860
    python app.py --run runs/cifar           opens a run folder, which may still be training
    python app.py --run runs/a runs/b        opens runs/a and plots the curves of runs/b alongside its own
    python app.py --weights convit_tiny      opens a released model, a weights file, or a URL

This file connects the page (viewer/web/) to what it shows (viewer/inspector.py), to the training runs that users start
(viewer/sessions.py), and to the figures that they save (viewer/export.py).
"""

import argparse
import atexit
import base64
import functools
import io
import os
import signal
import socket
import sys
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import: no outbound requests

import gradio as gr
import torch
from gradio.media import get_image
from PIL import Image
from starlette.middleware import Middleware

from images import center_crop, load_image
from training.patterns import patterns
from viewer.export import render_gif, render_png
from viewer.inspector import AttentionInspector, data_url, encode_image, open_run, open_weights, read_curves
from viewer.limits import RequestLimitMiddleware
from viewer.sessions import TrainingQueue

HERE = Path(__file__).parent
WEB = HERE / "viewer" / "web"
SCRIPTS = ["maps.js", "charts.js", "heads.js", "curves.js", "kernel.js", "train.js", "controls.js", "main.js"]
EXAMPLES = {"cheetah": "cheetah1.jpg", "lion": "lion.jpg", "bus": "bus.png", "tower": "tower.jpg"}  # part of Gradio
PAGE_CSS = """.gradio-container { overflow: visible !important; }
@media (max-width: 700px) { .gradio-container .main { padding: 8px !important; } }"""


def build_page(inspector: AttentionInspector, other_runs: list[Path] = ()) -> gr.Blocks:
    """The page for one model, with the curves of other runs. Raises ValueError for a run without metrics."""
    other_curves = read_other_curves(inspector.name, other_runs)
    training_queue, inspector_by_session = TrainingQueue(), {}
    atexit.register(training_queue.close)

    def select(request: dict) -> AttentionInspector:
        """The server's model (session ""), or the model that a session has trained."""
        for session, opened in list(inspector_by_session.items()):
            if not opened.run_dir.exists():
                inspector_by_session.pop(session, None)
        session = request["session"]
        if session == "":
            return inspector
        run_dir = training_queue.run_dir(session)
        if not run_dir.exists():
            raise ValueError("This training run has expired; please select another model.")
        opened = inspector_by_session.get(session)
        return opened or inspector_by_session.setdefault(session, open_run(run_dir, "trained here"))

    # the functions that the page's JavaScript calls
    def describe(request: dict) -> dict:
        selected = select(request)
        selected.refresh()
        examples = load_examples(selected.train_config.get("dataset"))
        thumbnails = [{"name": name, "thumbnail": thumbnail(data)} for name, data in examples.items()]
        curves = [] if request["session"] else other_curves
        return selected.describe() | {"other_curves": curves, "examples": thumbnails}

    def prepare_image(request: dict) -> dict:
        selected = select(request)
        if "example" in request:
            return selected.prepare_image(load_examples(selected.train_config.get("dataset"))[request["example"]])
        return selected.prepare_image(base64.b64decode(request["file"], validate=True))

    def layer_maps(request: dict) -> dict:
        return select(request).layer_maps(request["pixels"], request["layer"])

    def recompute(request: dict) -> dict:
        selected = select(request)
        return selected.recompute(request["pixels"], request["layer"], request["snapshot"], request["gates"])

    def export(request: dict) -> dict:
        selected, layer, query = select(request), request["layer"], request["query"]
        image = {"display": request["display"], "pixels": request["pixels"]}
        if request["animated"]:
            return {"file": data_url(render_gif(selected, image, layer, query), "image/gif")}
        gates, recomputed = request["gates"], request["recomputed"]
        png = render_png(selected, image, layer, request["snapshot"], query, gates, recomputed)
        return {"file": data_url(png, "image/png")}

    def train(request: dict) -> dict:
        if request["action"] == "start":
            inspector_by_session.pop(request["session"], None)  # the session's earlier run
        return training_queue.handle(request["session"], request["action"])

    # the function that Python clients call
    def heads(image: str, layer: int, snapshot: int = -1, row: int = 0, column: int = 0) -> list[dict]:
        """Gate and attention maps of every head of a layer, for one query patch of an image (a file in base64).

        Layers count from 1, as on the page; snapshots, rows, and columns from 0. Snapshot -1 is the last one.
        """
        (rows, columns), count = inspector.config.grid, len(inspector.epochs)
        ranges = {"layer": (layer, 1, len(inspector.layers)), "snapshot": (snapshot, -count, count - 1),
                  "row": (row, 0, rows - 1), "column": (column, 0, columns - 1)}  # fmt: skip
        for name, (value, lowest, highest) in ranges.items():
            if not (isinstance(value, int) and lowest <= value <= highest):
                raise gr.Error(f"expected a {name} from {lowest} to {highest}", print_exception=False)
        try:
            pixels = inspector.prepare_image(base64.b64decode(image, validate=True))["pixels"]
            return inspector.head_maps(pixels, layer - 1, snapshot % count, row * columns + column)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    with gr.Blocks(title="ConViT: watch heads escape locality", fill_width=True) as page:
        gr.HTML(
            html_template=(WEB / "page.html").read_text(),
            css_template=(WEB / "page.css").read_text(),
            js_on_load="\n".join((WEB / name).read_text() for name in SCRIPTS),
            server_functions=list(map(json_errors, (describe, prepare_image, layer_maps, recompute, export, train))),
            apply_default_css=False,
            elem_id="viewer",
        )
        gr.api(heads, api_name="heads", concurrency_limit=2)
    return page


def read_other_curves(name: str, runs: list[Path]) -> list[dict]:
    """Curves of other runs; where names repeat, they include the parent folder. Raises ValueError without metrics."""
    names = [name, *(run.name for run in runs)]
    curves = [read_curves(run, run.name if names.count(run.name) == 1 else "/".join(run.parts[-2:])) for run in runs]
    if None in curves:
        raise ValueError(f"{runs[curves.index(None)]} has no metrics.jsonl; pass run folders with --run")
    return curves


def json_errors(function):
    """Return a server function's errors to the page as a message for the user; requests may contain anything."""

    @functools.wraps(function)
    def wrapper(request: dict) -> dict:
        try:
            return function(request)
        except ValueError as error:
            return {"error": str(error)}
        except (KeyError, TypeError, IndexError, AttributeError, FileNotFoundError):
            return {"error": "Invalid request. Please reload the page."}

    return wrapper


@functools.cache
def load_examples(dataset: str | None) -> dict[str, bytes]:
    """Example images as files, by name: synthetic patterns for models trained on them, else photos."""
    if dataset != "patterns":
        return {name: Path(get_image(file)).read_bytes() for name, file in EXAMPLES.items()}
    images = patterns(4, "test")[0].permute(0, 2, 3, 1).numpy()
    return {f"pattern {index}": encode_image(Image.fromarray(pixels), "PNG") for index, pixels in enumerate(images, 1)}


@functools.lru_cache(maxsize=16)
def thumbnail(data: bytes) -> str:
    """A small version of an image file, as a data URL."""
    small = center_crop(load_image(io.BytesIO(data)), 96, 96)
    return data_url(encode_image(small, "JPEG", quality=85), "image/jpeg")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_mutually_exclusive_group()
    run_help = "run folder to open (default: demo/); more runs add their curves"
    model.add_argument("--run", nargs="+", default=[HERE / "demo"], type=Path, metavar="FOLDER", help=run_help)
    weights_help = "released model, weights file, or URL to open instead"
    model.add_argument("--weights", metavar="NAME|FILE|URL", help=weights_help)
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")  # set by Hugging Face Spaces
    parser.add_argument("--host", default=host, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, help="port to listen on (default: first free port from 7860)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    try:
        if args.weights:
            page = build_page(open_weights(args.weights))
        else:
            page = build_page(open_run(args.run[0]), args.run[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"app.py: {error}")
    try:
        socket.create_server((args.host, args.port or 0)).close()
    except (OSError, OverflowError) as error:
        sys.exit(f"app.py: cannot listen on --host {args.host} --port {args.port or 'any'}: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # runs atexit, which stops training
    # fmt: off
    page.launch(server_name=args.host, server_port=args.port, footer_links=[], quiet=True, run_history=False,
                css=PAGE_CSS, share=False, ssr_mode=False, prevent_thread_lock=True,
                app_kwargs={"middleware": [Middleware(RequestLimitMiddleware)]})
    # fmt: on
    print(f"Viewer running at {page.local_url} (press Ctrl-C to stop)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
