"""Interactive viewer: watch the heads of a ConViT escape locality.

    python app.py                            opens the models in demo/ on http://127.0.0.1:7860
    python app.py --run runs/cifar           opens a run folder, which may still be training
    python app.py --run runs/a runs/b        opens both, and plots the curves of each alongside those of the other
    python app.py --weights convit_tiny      opens a released model, a weights file, or a URL

This file connects the page (viewer/web/) to what it shows (viewer/inspector.py), to the training runs that users start
(viewer/sessions.py), and to the figures that they save (viewer/export.py).
"""

import argparse
import atexit
import base64
import functools
import os
import signal
import socket
import sys
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import: no outbound requests

import gradio as gr
import torch
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from images import MIN_SIZE
from predict import predict
from viewer.examples import describe_model, load_examples, open_demos
from viewer.export import render_gif, render_png
from viewer.inspector import AttentionInspector, data_url, open_run, open_weights
from viewer.limits import RequestLimitMiddleware, load_upload
from viewer.sessions import TrainingQueue

WEB = Path(__file__).parent / "viewer" / "web"
PAGE_CSS = """.gradio-container { overflow: visible !important; }
@media (max-width: 700px) { .gradio-container .main { padding: 8px !important; } }"""


def build_page(models: dict[str, AttentionInspector], compare: bool = False) -> gr.Blocks:
    """The page for some models, by key; the first one opens. With `compare`, it plots their curves together."""
    training_queue, inspector_by_session = TrainingQueue(), {}
    atexit.register(training_queue.close)

    def select(request: dict) -> AttentionInspector:
        """The model of a key ("" for the first one), or the one that a session has trained."""
        for session, opened in list(inspector_by_session.items()):
            if not opened.run_dir.exists():
                inspector_by_session.pop(session, None)
        key = request["model"]
        if key in models or key == "":
            return models.get(key) or next(iter(models.values()))
        run_dir = training_queue.run_dir(key)
        if not run_dir.exists():
            raise ValueError("This training run has expired; please select another model.")
        opened = inspector_by_session.get(key)
        return opened or inspector_by_session.setdefault(key, open_run(run_dir, "your tiny model"))

    # the functions that the page's JavaScript calls
    def describe(request: dict) -> dict:
        selected = select(request)
        selected.refresh()
        key = next((key for key, model in models.items() if model is selected), request["model"])
        others = [model.describe()["curves"] for model in models.values() if compare and model is not selected]
        return describe_model(key, selected, models) | {"other_curves": [curves for curves in others if curves]}

    def prepare_image(request: dict) -> dict:
        selected = select(request)
        if "example" in request:
            return selected.prepare_image(load_examples(selected)[request["example"]].data)
        return selected.prepare_image(base64.b64decode(request["file"], validate=True))

    def layer_maps(request: dict) -> dict:
        return select(request).layer_maps(request["pixels"], request["layer"])

    def recompute(request: dict) -> dict:
        selected = select(request)
        return selected.recompute(request["pixels"], request["layer"], request["snapshot"], request["gates"])

    def export(request: dict) -> dict:
        view = [request[name] for name in ("layer", "head", "query", "gates")]
        image = {"display": request["display"], "pixels": request["pixels"]}
        if request["animated"]:
            return {"file": data_url(render_gif(select(request), image, *view), "image/gif")}
        return {"file": data_url(render_png(select(request), image, *view, request["snapshot"]), "image/png")}

    def train(request: dict) -> dict:
        if request["action"] == "start":
            inspector_by_session.pop(request["model"], None)  # the session's earlier run
        return training_queue.handle(request["model"], request["action"])

    # the functions that Python clients call; images are files in base64, `model` is a key as in the page's URL
    def heads(image: str, layer: int, snapshot: int = -1, row: int = 0, column: int = 0, model: str = "") -> list[dict]:
        """Gate and attention maps of every head of a layer, for one query patch of an image.

        Layers count from 1, as on the page; snapshots, rows, and columns from 0. Snapshot -1 is the last one.
        """
        inspector = select({"model": model})
        (rows, columns), count = inspector.config.grid, len(inspector.epochs)
        ranges = {"layer": (layer, 1, inspector.config.depth), "snapshot": (snapshot, -count, count - 1),
                  "row": (row, 0, rows - 1), "column": (column, 0, columns - 1)}  # fmt: skip
        for name, (value, lowest, highest) in ranges.items():
            if not (isinstance(value, int) and lowest <= value <= highest):
                raise ValueError(f"expected a {name} from {lowest} to {highest}")
        pixels = inspector.prepare_image(base64.b64decode(image, validate=True))["pixels"]
        return inspector.head_maps(pixels, layer - 1, snapshot, row * columns + column)

    def classes(image: str, top: int = 3, model: str = "") -> list[tuple[str, float]]:
        """The most likely classes of an image and their probabilities, the best first."""
        upload = load_upload(base64.b64decode(image, validate=True), MIN_SIZE)
        return predict(select({"model": model}).models[-1], upload, top)

    with gr.Blocks(title="ConViT: watch heads escape locality", fill_width=True) as page:
        gr.HTML(
            html_template=(WEB / "page.html").read_text(),
            css_template=(WEB / "page.css").read_text(),
            js_on_load='import(new URL("web/main.js", document.baseURI)).then((page) => page.start(element, server));',
            server_functions=list(map(json_errors, (describe, prepare_image, layer_maps, recompute, export, train))),
            apply_default_css=False,
            elem_id="viewer",
        )
        for name, function in {"heads": heads, "predict": classes}.items():
            gr.api(api_errors(function), api_name=name, concurrency_limit=2)
    return page


def open_models(runs: list[Path]) -> dict[str, AttentionInspector]:
    """Run folders by name; where names repeat, they include the parent folder. Raises OSError or ValueError."""
    names = [run.name for run in runs]
    keys = [run.name if names.count(run.name) == 1 else "/".join(run.parts[-2:]) for run in runs]
    return {key: open_run(run, key) for key, run in zip(keys, runs, strict=True)}


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


def api_errors(function):
    """Show a function's errors to Python clients."""

    @functools.wraps(function)
    def wrapper(*args):
        try:
            return function(*args)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return wrapper


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_mutually_exclusive_group()
    run_help = "run folders to open (default: those in demo/)"
    model.add_argument("--run", nargs="+", type=Path, metavar="FOLDER", help=run_help)
    weights_help = "released model, weights file, or URL to open instead"
    model.add_argument("--weights", metavar="NAME|FILE|URL", help=weights_help)
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")  # set by Hugging Face Spaces
    parser.add_argument("--host", default=host, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, help="port to listen on (default: first free port from 7860)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    try:
        if args.weights:
            models = {"weights": open_weights(args.weights)}
        elif args.run:
            models = open_models(args.run)
        else:
            models = open_demos()
    except (OSError, ValueError) as error:
        sys.exit(f"app.py: {error}")
    page = build_page(models, compare=bool(args.run))
    try:
        socket.create_server((args.host, args.port or 0)).close()
    except (OSError, OverflowError) as error:
        sys.exit(f"app.py: cannot listen on --host {args.host} --port {args.port or 'any'}: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # runs atexit, which stops training
    # fmt: off
    page.launch(server_name=args.host, server_port=args.port, footer_links=[], quiet=True, run_history=False,
                css=PAGE_CSS, share=False, ssr_mode=False, prevent_thread_lock=True,
                app_kwargs={"middleware": [Middleware(RequestLimitMiddleware)],
                            "routes": [Mount("/web", StaticFiles(directory=WEB))]})
    # fmt: on
    print(f"Viewer running at {page.local_url} (press Ctrl-C to stop)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
