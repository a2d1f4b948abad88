"""What the documentation promises: links, tables, numbers, commands, Python blocks, and the front matter of a Space."""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import CONFIG, DEMO, ROOT, perturb, serving
from gradio.media import get_image

import train_cifar
import train_imagenet
from convit_min import ConViT, create_model
from training.config import CHANGEABLE_ON_RESUME, parse_flags
from training.image_folder import _defer_signals

README = (ROOT / "README.md").read_text()
DOCS = {f"docs/{file.name}": file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()} | DOCS
FILES = [
    *TEXTS,
    "docs/tour.ipynb",
    *(str(file.relative_to(ROOT)) for folder in ("demo", "results") for file in sorted((ROOT / folder).rglob("*.md"))),
]
BLOCKS = {  # by their file and first line
    f"{name}: {block.splitlines()[0]}": block
    for name, text in TEXTS.items()
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
}


def code_lines(text: str) -> list[str]:
    """The lines of indented code blocks, with continuation lines joined."""
    return re.findall(r"^    (\S.*)$", re.sub(r"\\\n\s+", "", text), re.MULTILINE)


def find_commands() -> list[str]:
    """All commands of our scripts in the documentation and in docstrings, which --help prints.

    Without what precedes "train_imagenet.py" and the like.
    """
    folders = "", "viewer/", "experiments/", "benchmarks/"
    scripts = [file for folder in folders for file in ROOT.glob(f"{folder}*.py")]
    docstrings = [ast.get_docstring(ast.parse(file.read_text())) or "" for file in scripts]
    commands = set()
    for text in [*TEXTS.values(), *docstrings]:
        for line in [*code_lines(text), *re.findall(r"`(python [^`]+)`", text)]:
            if match := re.search(r"(?:-- |python )((?:-m \w+\.|\w+\.py).*)", line):
                command = re.split(r"\s{2,}", match[1].rstrip("'"))[0]  # a description may follow
                if "$" not in command and "..." not in command:
                    commands.add(" ".join(shlex.split(command, comments=True)))
    return sorted(commands)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a text."""
    headings = re.findall(r"^#+ (.+)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", FILES)
def test_links_resolve(name):
    file = ROOT / name
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", file.read_text()):
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_readme_is_at_most_170_lines_and_lists_all_folders():
    assert len(README.splitlines()) <= 170
    assert len(re.findall(r"^    (.*pytest)$", README, re.MULTILINE)) == 1  # the one that .ci/run extracts
    entries = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in code_lines(README.split("## Folders")[1]))
    assert all((ROOT / name).exists() and len(words.split()) <= 6 for name, words in entries.items())
    packages = {f"{file.parent.name}/" for file in ROOT.glob("*/__init__.py")}
    assert packages | {file.name for file in ROOT.glob("*.py")} <= entries.keys()


@pytest.mark.parametrize("command", find_commands())
def test_commands_have_known_flags(command, monkeypatch):
    program, *args = command.removeprefix("-m ").split()
    if program == "http.server":
        return  # of Python itself
    for module in (train_cifar, train_imagenet):
        if program == f"{module.__name__}.py":
            args = re.sub(r"--resume|--eval|--config \S+", "", " ".join(args)).split()  # they would read a run folder
            monkeypatch.setattr(sys, "argv", [program, *args])
            assert parse_flags(module.Config, "").total_epochs > 0
            return
    file = ROOT / (program if program.endswith(".py") else program.replace(".", "/") + ".py")
    sources = [file.read_text()] + [(ROOT / "benchmarks/timing.py").read_text()] * program.startswith("benchmarks")
    flags = [arg for arg in args if arg.startswith("--")]
    assert all(any(f'"{flag}"' in source for source in sources) for flag in flags), flags


def test_flags_that_may_change_on_resume_are_listed():
    sentence = re.search(r"These flags may change on `--resume`:(.*?);", DOCS["docs/distributed.md"], re.DOTALL)[1]
    listed = {name.replace("-", "_") for name in re.findall(r"`--([\w-]+)`", sentence)}
    assert listed | {"run", "resume", "weights", "eval", "csv"} == CHANGEABLE_ON_RESUME  # these belong to one command


def test_workers_outlast_the_documented_shutdown(monkeypatch):
    """torchrun sends SIGTERM to all: workers that ended at once would end the step that is being saved."""
    script = re.search(r"    #!/bin/bash\n(?:    .*\n)+", DOCS["docs/distributed.md"])[0]
    assert {"--nodes", "--ntasks-per-node", "--gpus-per-node"} <= set(re.findall(r"(--[\w-]+)=", script))
    documented = re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", DOCS["docs/distributed.md"])
    handlers, alarms = {}, []
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(signal, "alarm", alarms.append)
    _defer_signals(0)
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert alarms == [int(documented[1])] and handlers[signal.SIGINT] == signal.SIG_IGN


def test_seed_loop_prints_mean_and_standard_deviation(tmp_path):
    """But nothing if a run fails."""
    loop = re.search(r"^    (\(for seed in .* runs/seed\*)$", DOCS["docs/distributed.md"], re.DOTALL | re.MULTILINE)[1]
    (tmp_path / "train_cifar.py").write_text("""
import os, sys
from pathlib import Path
run, seed = Path(sys.argv[-1]), sys.argv[sys.argv.index("--seed") + 1]
run.mkdir(parents=True, exist_ok=True)
(run / "metrics.jsonl").write_text('{}\\n{"test_accuracy": %d}\\n' % (50 + 2 * int(seed)))
sys.exit(seed == os.environ.get("FAILING"))
""")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for failing, expected in (("1", ""), ("none", "52.0 ± 2.0 (3)\n")):
        env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "FAILING": failing}
        command = ["bash", "-c", loop.replace("\n    ", "\n")]
        assert subprocess.run(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True).stdout == expected


OPTIONAL = {"playwright", "scipy", "tensorboard", "timm", "safetensors"}  # only in requirements-dev.txt
PACKAGES = {"PIL": "pillow", "gradio_client": "gradio", "huggingface_hub": "gradio", "packaging": "gradio"}


def imports(file: Path) -> set[str]:
    """The modules and packages that a file imports."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[0] for name in plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}}


def test_requirements_list_what_is_imported():
    """The test tools aside, which need only be in requirements-dev.txt."""
    listed = {
        name: set(re.findall(r"^[\w-]+", (ROOT / f"requirements{name}.txt").read_text(), re.MULTILINE))
        for name in ("", "-dev")
    }
    ours = {path.stem for path in ROOT.iterdir()}
    for file in (file for pattern in ("*.py", "[a-z]*/*.py") for file in ROOT.glob(pattern)):
        others = imports(file) - sys.stdlib_module_names - ours - {"conftest"}
        packages = {PACKAGES.get(name, name) for name in others}
        required = listed[""] | (listed["-dev"] if file.parent.name == "tests" else OPTIONAL & listed["-dev"])
        assert packages <= required, file


@pytest.fixture
def workspace(tmp_path, monkeypatch, request):
    """A folder with an image and a run, where weights that would be downloaded are made up."""
    (tmp_path / "runs" / "cifar").mkdir(parents=True)
    shutil.copy(max((DEMO / "snapshots").iterdir()), tmp_path / "runs" / "cifar" / "best.pt")
    shutil.copy(get_image("cheetah1.jpg"), tmp_path / "cat.jpg")
    (tmp_path / "demo").symlink_to(DEMO.parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

    def download(url: str, file: str):
        if url == "https://dl.fbaipublicfiles.com/convit/convit_tiny.pth":
            return torch.save(request.getfixturevalue("released").state_dict(), file)
        assert url == "https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth"
        deit = perturb(create_model("deit_tiny")).state_dict()
        deit["pos_embed"] = torch.cat([deit["cls_token"], deit["pos_embed"]], dim=1)
        torch.save({"model": deit}, file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)


@pytest.fixture
def released() -> torch.nn.Module:
    return perturb(create_model("convit_tiny"))


@pytest.fixture
def timm_model(monkeypatch, released) -> torch.nn.Module:
    """What timm.create_model returns: `released`, which needs no download."""
    model = timm.create_model("convit_tiny")
    model.load_state_dict(released.state_dict())
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: model)
    return model.eval()


def run_block(title: str) -> dict:
    """Execute the Python block with these words in its first line; return its variables."""
    (block,) = (block for name, block in BLOCKS.items() if title in name)
    variables = {}
    exec(block, variables)
    return variables


def same_logits(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    images = torch.randn(1, 3, *model.config.image_shape)
    with torch.no_grad():
        return torch.allclose(model(images), other.eval()(images), atol=1e-4)


def test_imports_point_one_way():
    """As CONTRIBUTING.md says."""
    ours, allowed = {path.stem for path in ROOT.iterdir()}, set()
    for level in (["convit_min", "images"], ["weights", "analysis"], ["training"], ["viewer"]):
        for name in level:
            for file in [*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/*.py")]:
                assert imports(file) & ours <= allowed | {name}, file
        allowed |= set(level)
    assert imports(ROOT / "convit_min.py") - sys.stdlib_module_names == {"torch", "einops"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [name for name in BLOCKS if not re.search("client|timm|export:", name)])
def test_python_runs_as_written(name, workspace):
    exec(BLOCKS[name], {})


def test_readme_gets_attention_maps_in_five_lines():
    name = "README.md: import torch"
    assert len(list(filter(None, BLOCKS[name].splitlines()))) == 5
    attention = run_block(name)["attention"]
    assert attention[0].mixed.shape == (1, 4, 196, 196) and attention[0].gate.shape == (4,)


def test_weights_of_the_authors(released, workspace):
    assert same_logits(run_block("the authors' weights")["model"], released)


def test_weights_of_a_run(workspace):
    variables = run_block("your own run")
    record = torch.load("runs/cifar/best.pt", weights_only=True)
    state = variables["model"].state_dict()
    assert all(torch.equal(value.half(), record["model"][name]) for name, value in state.items())
    assert (variables["model"].classes, variables["model"].epoch) == (record["classes"], record["epoch"])


def test_weights_of_timm_and_back(released, timm_model):
    variables = run_block("timm's weights")
    model = variables["model"]
    assert model is not released and same_logits(released, model)
    perturb(model)
    assert not same_logits(model, timm_model)
    exec("timm_model.load_state_dict(model.state_dict())", variables)  # the last line of the block
    assert same_logits(model, timm_model)


def test_deit_goes_back_to_timm():
    ours, theirs = perturb(create_model("deit_tiny")), timm.create_model("deit_tiny_patch16_224")
    state = ours.state_dict()
    exec(re.search(r'`(state\["pos_embed"\] = .+?)`', DOCS["docs/finetuning.md"])[1], {"state": state, "F": F})
    theirs.load_state_dict(state)
    assert same_logits(ours, theirs)


def test_features_of_several_blocks():
    variables = run_block("features of several blocks")
    variables["backbone"](torch.randn(1, 3, 224, 224))
    shapes = {index: features.shape for index, features in variables["features"].items()}
    assert shapes == dict.fromkeys((3, 6, 9), (1, 196, 192))


def test_pip_installs_the_model_alone():
    text = (ROOT / "pyproject.toml").read_text()
    modules, needed = (
        ast.literal_eval(re.search(rf"^{name} = (\[.*\])$", text, re.MULTILINE)[1])
        for name in ("py-modules", "dependencies")
    )
    assert modules == ["convit_min"] and {re.match(r"\w+", line)[0] for line in needed} == {"torch", "einops"}
    assert set(needed) <= set((ROOT / "requirements.txt").read_text().splitlines())


def test_features_for_any_image_size(workspace):
    variables = run_block("features of the patches")
    assert variables["feature_map"].shape == (2, 192, 16, 12) and variables["cls_token"].shape == (2, 192)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_exported_model_takes_any_batch_and_size(tmp_path, monkeypatch):
    """With a small model instead of the demo, one block of either kind."""
    import onnxruntime  # slow

    model = perturb(ConViT(replace(CONFIG, depth=2, gpsa_layers=1)))
    monkeypatch.setattr("weights.open_model", lambda _: model)
    monkeypatch.chdir(tmp_path)
    program = run_block("export: batch")["program"].module()
    session = onnxruntime.InferenceSession("model.onnx")
    for shape in ((2, 3, 32, 32), (5, 3, 20, 28), (1, 3, 12, 36)):
        images = torch.randn(shape)
        with torch.no_grad():
            expected = model(images)
            torch.testing.assert_close(program(images), expected, atol=1e-5, rtol=0)
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=0)
    fixed = torch.export.export(model, (torch.randn(2, 3, 20, 28),))
    assert "upsample" in str(program) and "upsample" not in str(fixed)  # resizes pos_embed only where sizes may differ


def test_attention_rollout(workspace):
    variables = run_block("attention rollout")
    torch.testing.assert_close(variables["rollout"].sum(-1), torch.ones(1, 65))
    row = torch.eye(65)[0]  # backward, from the class token to the input
    for maps in reversed(variables["attention"]):
        mixed = maps.mixed[0].mean(0)
        attended = torch.cat([row[:1], row[1:] @ mixed]) if len(mixed) == 64 else row @ mixed
        row = (row + attended) / 2
    torch.testing.assert_close(variables["rollout"][0, 0], row)
    torch.testing.assert_close(variables["heat_map"], row[1:].unflatten(0, (8, 8)))


def test_notebook_prints_what_it_shows(tmp_path):
    """With a training of two steps; what follows from the training, or from the decoder of photos, is not compared."""

    def stable(text: str) -> str:
        return re.sub(r", distance [\d.]+", "", text)  # of attention maps of a photo

    cells = json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"]
    cells = [("".join(cell["source"]), cell["outputs"]) for cell in cells if cell["cell_type"] == "code"]
    code, count = re.subn(r'"epochs": \d+, "steps_per_epoch": \d+', '"epochs": 1, "steps_per_epoch": 2',
                          "\n".join(source for source, _ in cells))  # fmt: skip
    env = os.environ | {"MPLBACKEND": "Agg", "TMPDIR": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", env=env, capture_output=True, text=True)
    assert process.returncode == 0 and count == 1, process.stderr
    shown = ["".join(outputs[0]["text"]) for source, outputs in cells if outputs and "text" in outputs[0]
             and not re.search(r"train\(|open_model\(run\)|predict\(", source)]  # fmt: skip
    assert len(shown) == 3 and all(stable(text) in stable(process.stdout) for text in shown)
    assert all(f"gates {gate}: accuracy" in process.stdout for gate in ("trained", 1, 0))


def test_hugging_face_space_and_python_client(workspace, tmp_path_factory, monkeypatch):
    """The front matter in docs/viewer.md is valid, matches requirements.txt, and the app starts as in a Space."""
    import gradio_client
    import huggingface_hub as hub
    from packaging.requirements import Requirement

    lines = re.search(r"^    ---\n(.*?)^    ---\n", DOCS["docs/viewer.md"], re.DOTALL | re.MULTILINE)[0]
    card = hub.SpaceCard(lines.replace("\n    ", "\n").lstrip() + "\n" + README).data
    requirements = (ROOT / "requirements.txt").read_text().split()
    gradio = Requirement(next(line for line in requirements if line.startswith("gradio")))
    assert card.sdk == "gradio" and gradio.specifier.contains(card.sdk_version)
    assert (ROOT / card.app_file).exists() and card.license == "mit"
    client = gradio_client.Client
    with serving(tmp_path_factory.mktemp("server"), space=True) as url:
        if sys.platform == "linux":  # it listens on all addresses; macOS has only one
            assert b"ConViT" in urllib.request.urlopen(url.replace("127.0.0.1", "127.0.0.2")).read()
        monkeypatch.setattr(gradio_client, "Client", lambda _: client(url, verbose=False))
        heads = run_block("client of a running viewer")["heads"]
    assert len(heads) == 9 and 0 < heads[4]["gate"] < 1
    assert len(heads[4]["mixed"]) == 8 and sum(map(sum, heads[4]["mixed"])) == pytest.approx(1, abs=1e-5)
