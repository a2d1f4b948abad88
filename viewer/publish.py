"""Write the page as a folder for static hosts such as GitHub Pages: no server, and no model.

    python -m viewer.publish site
    python -m http.server --directory site          to try it

The folder contains the example images of the models in demo/, with the maps of all layers and snapshots, and for the
last snapshot those with all gates pinned to position or to content. Uploads, other gates, and training need app.py.
"""

import argparse
import gzip
import json
import shutil
import sys
from pathlib import Path

from viewer.inspector import AttentionInspector, open_demos

WEB = Path(__file__).parent / "web"
INDEX = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>ConViT: watch heads escape locality</title>
<style>
html {{ color-scheme: light dark; }}
body {{
  margin: 0; padding: 24px;
  @media (max-width: 700px) {{ padding: 8px; }}
  {css}
}}
</style>
{page}
<script type="module">
  import {{ start }} from "./web/main.js";
  import {{ staticServer }} from "./web/static.js";

  start(staticServer(new URL("data/", document.baseURI), "{first}"), true);
</script>
"""


def publish(models: dict[str, AttentionInspector], folder: Path):
    """Write the page for some models, by key; the first one opens."""
    shutil.copytree(WEB, folder / "web", ignore=shutil.ignore_patterns("*.html", "*.css"), dirs_exist_ok=True)
    page, css = ((WEB / name).read_text() for name in ("page.html", "page.css"))
    (folder / "index.html").write_text(INDEX.format(page=page, css=css, first=next(iter(models))))
    names = [{"key": key, "name": inspector.name} for key, inspector in models.items()]
    for key, inspector in models.items():
        answers = {"model": inspector.describe() | {"key": key, "models": names, "other_curves": []}}
        for name, example in inspector.examples.items():
            answers |= image_answers(inspector, name, example.data)
        for name, answer in answers.items():
            file = folder / "data" / key / f"{name}.bin"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(gzip.compress(json.dumps(answer).encode(), compresslevel=6, mtime=0))


def image_answers(inspector: AttentionInspector, name: str, data: bytes) -> dict[str, dict | list]:
    """What the server answers to requests for an image, by the names that web/static.js loads."""
    image, last, config = inspector.prepare_image(data), len(inspector.models) - 1, inspector.config
    answers = {name: image | {"pixels": name}}  # with which the page asks for its maps
    for layer in range(config.depth):
        answers[f"{name}-{layer}"] = inspector.layer_maps(image["pixels"], layer)
        for pin in (0, 1):
            gates = [[pin] * config.num_heads] * config.depth
            answers[f"{name}-{layer}-{last}-{pin}"] = inspector.recompute(image["pixels"], layer, last, gates)
    return answers


def main():
    parser = argparse.ArgumentParser(
        prog="python -m viewer.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder to write")
    try:
        publish(open_demos(), parser.parse_args().folder)
    except (OSError, ValueError) as error:
        sys.exit(f"viewer.publish: {error}")


if __name__ == "__main__":
    main()
