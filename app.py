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
import io
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import: no outbound requests

import gradio as gr
import torch
from einops import rearrange
from gradio.media import get_image
from PIL import Image
from starlette.middleware import Middleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from images import center_crop, load_image
from training.patterns import patterns
from viewer.export import render_gif, render_png
from viewer.inspector import AttentionInspector, data_url, encode_image, open_run, open_weights
from viewer.limits import RequestLimitMiddleware
from viewer.sessions import TrainingQueue

HERE = Path(__file__).parent
WEB = HERE / "viewer" / "web"
DEMOS = {"patterns": "Find the match (synthetic)", "cifar10": "CIFAR-10 photos"}  # folder in demo/: title
PHOTOS = {"cheetah": "cheetah1.jpg", "lion": "lion.jpg", "bus": "bus.png", "tower": "tower.jpg"}  # part of Gradio
MAX_EXAMPLES = 6
PATCH = 4  # pixels; the squares of the patterns are aligned with it
PAGE_CSS = """.gradio-container { overflow: visible !important; }
@media (max-width: 700px) { .gradio-container .main { padding: 8px !important; } }"""


class Example(NamedTuple):
    """An image that the page offers."""

    data: bytes  # of an image file
    label: str | None = None  # its class, where the model knows it
    queries: tuple[int, ...] = ()  # patches of interest
    target: tuple[int, ...] = ()  # patches that show what these have to find


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
        others = [model.describe()["curves"] for model in models.values() if compare and model is not selected]
        return selected.describe() | {
            "key": next((key for key, model in models.items() if model is selected), request["model"]),
            "models": [{"key": key, "name": model.name} for key, model in models.items()],
            "other_curves": [curves for curves in others if curves],
            "examples": [
                {"name": name, "thumbnail": thumbnail(example.data)} | example._replace(data=None)._asdict()
                for name, example in load_examples(selected).items()
            ],
            "opening": opening_view(selected),
        }  # fmt: skip

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

    # the function that Python clients call
    def heads(image: str, layer: int, snapshot: int = -1, row: int = 0, column: int = 0) -> list[dict]:
        """Gate and attention maps of every head of a layer, for one query patch of an image (a file in base64).

        The model is the one that the page opens with. Layers count from 1, as on the page; snapshots, rows, and columns
        from 0. Snapshot -1 is the last one.
        """
        inspector = next(iter(models.values()))
        (rows, columns), count = inspector.config.grid, len(inspector.epochs)
        ranges = {"layer": (layer, 1, inspector.config.depth), "snapshot": (snapshot, -count, count - 1),
                  "row": (row, 0, rows - 1), "column": (column, 0, columns - 1)}  # fmt: skip
        for name, (value, lowest, highest) in ranges.items():
            if not (isinstance(value, int) and lowest <= value <= highest):
                raise gr.Error(f"expected a {name} from {lowest} to {highest}", print_exception=False)
        try:
            pixels = inspector.prepare_image(base64.b64decode(image, validate=True))["pixels"]
            return inspector.head_maps(pixels, layer - 1, snapshot, row * columns + column)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    with gr.Blocks(title="ConViT: watch heads escape locality", fill_width=True) as page:
        gr.HTML(
            html_template=(WEB / "page.html").read_text(),
            css_template=(WEB / "page.css").read_text(),
            js_on_load='import(new URL("web/main.js", document.baseURI)).then((page) => page.start(element, server));',
            server_functions=list(map(json_errors, (describe, prepare_image, layer_maps, recompute, export, train))),
            apply_default_css=False,
            elem_id="viewer",
        )
        gr.api(heads, api_name="heads", concurrency_limit=2)
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


def load_examples(inspector: AttentionInspector) -> dict[str, Example]:
    """Example images by name: of the model's dataset where they can be read, else of its run folder, and photos."""
    config = inspector.train_config
    return _load_examples(config.get("dataset"), config.get("data_dir"), inspector.run_dir, tuple(inspector.classes))


@functools.lru_cache(maxsize=16)
def _load_examples(
    dataset: str | None, data_dir: str | None, run_dir: Path | None, classes: tuple[str, ...]
) -> dict[str, Example]:
    from training.data import cifar_class  # slow to import
    from training.folders import find_images

    if dataset == "patterns":
        return pattern_examples(classes)
    data_dir = Path(data_dir or "")
    files = {name: Path(get_image(file)) for name, file in PHOTOS.items()}
    if own := sorted(run_dir.glob("images/*.jpg")) if run_dir else []:  # named after their classes
        files = {file.stem: file for file in own} | files
    elif (cifar := cifar_class(dataset)) and (data_dir / cifar.base_folder).is_dir():
        test = cifar(data_dir, train=False)
        first = {test.classes[label]: image for image, label in reversed([*zip(test.data, test.targets, strict=True)])}
        images = {name: encode_image(Image.fromarray(image), "PNG") for name, image in first.items()}
        return {name: Example(images[name], name) for name in test.classes[:MAX_EXAMPLES]}
    elif dataset == "folder" and (split := next(filter(Path.is_dir, (data_dir / "test", data_dir / "val")), None)):
        files = {name: paths[0] for name, paths in find_images(split).items()}
    shown = list(files.items())[:MAX_EXAMPLES]
    return {name: Example(file.read_bytes(), name if name in classes else None) for name, file in shown}


def pattern_examples(classes: tuple[str, ...]) -> dict[str, Example]:
    """The first test image of every texture: patches of the plain square, and of the texture of its color."""
    examples = {}
    for pixels, label in zip(*(part[:32] for part in patterns(2000, "test")), strict=True):
        patches = rearrange(pixels, "c (Y p) (X q) -> (Y X) (p q) c", p=PATCH, q=PATCH)
        is_plain = (patches == patches[:, :1]).all(dim=(1, 2))
        has_color = (patches == patches[is_plain][0, 0]).all(dim=2).any(dim=1)
        queries, target = (tuple(mask.nonzero()[:, 0].tolist()) for mask in (is_plain, has_color & ~is_plain))
        file = encode_image(Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy()), "PNG")
        examples.setdefault(classes[label], Example(file, classes[label], queries, target))
    return examples


def opening_view(inspector: AttentionInspector) -> dict:
    """The view that shows most: an image that the model learns to classify, and a head that escapes."""
    examples = load_examples(inspector)
    pixels = {name: inspector.prepare_image(example.data)["pixels"] for name, example in examples.items()}
    learned = [name for name, example in examples.items() if inspector.learns(pixels[name], example.label)]
    heads = {name: inspector.telling_head(pixels[name], examples[name].queries, examples[name].target)
             for name in learned or list(examples)[:1]}  # fmt: skip
    name = max(heads, key=heads.get)
    return {"image": name, "layer": heads[name][1], "head": heads[name][2]}


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
            models = {name: open_run(HERE / "demo" / name, title) for name, title in DEMOS.items()}
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
