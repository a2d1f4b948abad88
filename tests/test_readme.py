"""What README.md and EXERCISES.md promise: every file they link to, the lines to paste, the front matter of a Space."""

import re
import urllib.request

import pytest
import torch
from conftest import DEMO, ROOT, perturb, serving

from convit_min import create_model

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("file", sorted(file.relative_to(ROOT) for file in [*ROOT.glob("*.md"), DEMO / "README.md"]))
def test_every_linked_file_is_there(file):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / file).read_text())
    missing = [link for link in links if not (ROOT / file.parent / link).exists()]
    assert links and not missing


@pytest.mark.parametrize("name", ["sample-efficiency", "ablation", "locality"])
def test_the_tables_are_those_of_the_results(name):
    rows = [line for line in (ROOT / f"results/reproduce/laptop/{name}.md").read_text().splitlines() if line[:1] == "|"]
    assert len(rows) > 4 and "\n".join(rows) in README


def lines_about(words: str) -> str:
    """The only Python in the README whose first line has these words; five lines at most, but for imports."""
    blocks = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if words in block.split("\n")[0]]
    assert len(blocks) == 1
    assert len([line for line in blocks[0].splitlines()[1:] if line]) <= 5
    return blocks[0]


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def same_answers(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    images = torch.randn(1, 3, *one.config.image_shape)
    with torch.no_grad():
        return torch.allclose(one(images), other.eval()(images), atol=1e-4)


@pytest.fixture(scope="module")
def released() -> torch.nn.Module:
    return perturb(create_model("convit_tiny"))


def test_the_authors_weights(released, monkeypatch):
    def download(url: str, **_) -> dict:
        assert url == "https://dl.fbaipublicfiles.com/convit/convit_tiny.pth"
        return {"model": released.state_dict()}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    names = {}
    exec(lines_about("the authors'"), names)
    assert same_answers(names["model"], released)


def test_weights_of_ones_own(in_a_folder):
    names, last = {}, max((DEMO / "snapshots").iterdir())
    exec(lines_about("a run of your own").replace("runs/cifar/best.pt", str(last)), names)
    weights = torch.load(last, weights_only=True)["model"]
    assert all(torch.equal(value.half(), weights[key]) for key, value in names["model"].state_dict().items())


def test_timm_there_and_back(released, in_a_folder, monkeypatch):
    timm = pytest.importorskip("timm", reason="timm is the reference; pip install -r requirements-dev.txt")
    theirs = timm.create_model("convit_tiny")
    theirs.load_state_dict(released.state_dict())
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: theirs)
    names = {}
    exec(lines_about("timm's"), names)
    assert names["model"] is not released and same_answers(names["model"].eval(), released)
    theirs.load_state_dict(perturb(create_model("convit_tiny")).state_dict())
    assert not same_answers(released, theirs)
    exec(lines_about("timm's").splitlines()[-1], names)  # back
    assert same_answers(released, theirs)


def test_a_hugging_face_space(tmp_path):
    """The lines to put on top are a Space's front matter, for a Gradio that we take, and the page comes up as there."""
    hub = pytest.importorskip("huggingface_hub", reason="comes with gradio")
    from packaging.requirements import Requirement

    front_matter = re.search(r"^    ---\n(.*?)^    ---\n", README, re.DOTALL | re.MULTILINE)[0].replace("\n    ", "\n")
    card = hub.SpaceCard(front_matter.lstrip() + "\n" + README).data
    wanted = next(line for line in (ROOT / "requirements.txt").read_text().split() if line.startswith("gradio"))
    assert card.sdk == "gradio" and Requirement(wanted).specifier.contains(card.sdk_version)
    assert (ROOT / card.app_file).exists() and card.license == "mit"
    with serving(tmp_path, space=True) as address:
        other = address.replace("127.0.0.1", "127.0.0.2")  # it listens to everyone
        assert b"ConViT" in urllib.request.urlopen(other).read()
