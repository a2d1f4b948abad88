"""What the page offers before an upload: the models in demo/, example images, and a view to open with."""

import functools
import io
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

from einops import rearrange
from gradio.media import get_image
from PIL import Image

from images import center_crop, load_image
from training.patterns import patterns
from viewer.inspector import AttentionInspector, data_url, encode_image, open_run

DEMOS = {"patterns": "Find the match (synthetic)", "cifar10": "CIFAR-10 photos"}  # folder in demo/: title
PHOTOS = {"cheetah": "cheetah1.jpg", "lion": "lion.jpg", "bus": "bus.png", "tower": "tower.jpg"}  # part of Gradio
MAX_EXAMPLES = 6
PATCH = 4  # pixels; the squares of the patterns are aligned with it
openings = WeakKeyDictionary()  # by inspector: its number of snapshots, and the view for them


class Example(NamedTuple):
    """An image that the page offers."""

    data: bytes  # of an image file
    label: str | None = None  # its class, where the model knows it
    queries: tuple[int, ...] = ()  # patches of interest
    target: tuple[int, ...] = ()  # patches that show what these have to find


def open_demos() -> dict[str, AttentionInspector]:
    """The models in demo/, by folder; the first one opens."""
    folder = Path(__file__).parent.parent / "demo"
    return {name: open_run(folder / name, title) for name, title in DEMOS.items()}


def describe_model(key: str, selected: AttentionInspector, models: dict[str, AttentionInspector]) -> dict:
    """Everything that the page shows of a model without an image, and the `models` to choose from."""
    return selected.describe() | {
        "key": key,
        "models": [{"key": key, "name": model.name} for key, model in models.items()],
        "examples": [
            {"name": name, "thumbnail": thumbnail(example.data)} | example._replace(data=None)._asdict()
            for name, example in load_examples(selected).items()
        ],
        "opening": opening_view(selected),
    }


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
    """The view that shows most: an image that the model learns to classify, and a head that escapes.

    It is computed once per new snapshot, since the page asks for it every second while a model trains.
    """
    num_snapshots = len(inspector.epochs)
    if openings.get(inspector, (0,))[0] != num_snapshots:
        openings[inspector] = num_snapshots, _find_opening(inspector)
    return openings[inspector][1]


def _find_opening(inspector: AttentionInspector) -> dict:
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
