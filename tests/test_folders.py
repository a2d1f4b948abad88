"""Folders of images as people have them: trees, splits, formats, and unreadable files."""

import os
import re
import shutil
import struct
import sys
import types
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

import train_cifar
import train_imagenet
from analysis import read_metrics
from convit_min import create_model
from images import load_crop, load_image, normalize, preprocess
from training.config import parse_flags
from training.data import ImageSet, InMemoryData, RunData, decode, infer_dataset, load_images
from training.distributed import UserError
from training.folders import find_images
from training.image_folder import ImageFolderDataset, load_data, random_resized_crop
from training.patterns import patterns
from viewer.inspector import AttentionInspector
from weights import open_model

CPU = torch.device("cpu")
SCRIPTS = {"train_cifar": (train_cifar, InMemoryData), "train_imagenet": (train_imagenet, load_data)}
EVAL_SPLIT = {"train_cifar": "test", "train_imagenet": "val"}
each_script = pytest.mark.parametrize("name", SCRIPTS)
ORIENTATION = 0x0112


def save_images(folder: Path, count: int, seed: int = 0):
    """Noise of 16 x 16 pixels."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")


@pytest.fixture
def tree(tmp_path) -> Path:
    """24 training and 6 evaluation images of two classes, as train/, test/, and val/."""
    root = tmp_path / "images"
    for split, count in (("train", 12), ("test", 3), ("val", 3)):
        for seed, name in enumerate(("cat", "dog")):
            save_images(root / split / name, count, seed)
    return root


@pytest.fixture
def read(tree, tmp_path, monkeypatch):
    """All images that a script reads in an epoch: the numbers for training and for evaluation, and the data."""

    def call(name: str, *flags) -> tuple[int, int, RunData]:
        script, load = SCRIPTS[name]
        small = ["--batch-size", "2", "--img-size", "8", "--workers", "0", "--device", "cpu", "--weights", "none.pt"]
        small += ["--aug-repeats", "1"] if name == "train_imagenet" else []
        argv = [name, "--data-dir", tree, "--run", tmp_path / "run", *small, *flags]
        monkeypatch.setattr(sys, "argv", [str(value) for value in argv])
        config = parse_flags(script.Config, "")
        data = load(config, CPU)
        trained = 0 if config.eval else sum(len(labels) for _, labels in data.train_batches(1))
        return trained, sum(len(labels) for _, labels, _ in data.eval_batches()), data

    return call


def damage(file: Path):
    file.write_bytes(file.read_bytes()[:100])


def test_nested_folders_links_and_other_files(tree, capsys):
    cat = tree / "train" / "cat"
    save_images(cat / "indoors" / "2024", 2)
    save_images(cat / ".thumbnails", 1)
    save_images(cat / "@eaDir" / "1.png", 1)
    shutil.move(cat / "indoors" / "2024" / "1.png", cat / "indoors" / "photo.JPG")
    save_images(tree / "elsewhere", 3)
    (cat / "album").symlink_to(tree / "elsewhere")
    (cat / "again").symlink_to(tree / "elsewhere")
    for link, target in (("all", ".."), ("self", "self"), ("gone.png", "nothing.png")):
        (cat / link).symlink_to(target)
    (tree / "elsewhere" / "back").symlink_to(cat)
    for other in ("cat/Thumbs.db", "cat/labels.csv", "cat/figure.eps", "dog/notes.txt", "README.md"):
        (tree / "train" / other).write_text("")
    found = find_images(tree / "train")
    names = {str(file.relative_to(cat)) for file in found["cat"]} - {f"{index}.png" for index in range(12)}
    albums = {str(Path(name).parent) for name in names}
    assert albums <= {"indoors", "indoors/2024", "album", "again"} and len(albums) == 3
    assert len(names) == 5 and len(found["dog"]) == 12
    (note,) = capsys.readouterr().out.splitlines()
    for part in (
        "2 broken links (cat/gone.png, cat/self)",
        "1 outside of class folders (README.md)",
        "4 of an unsupported type (cat/Thumbs.db, cat/figure.eps, cat/labels.csv, dog/notes.txt)",
        "3 links to folders that are already included (",
    ):
        assert part in note
    for index in range(20):
        (cat / f"{index}.csv").write_text("")
    find_images(tree / "train")
    assert "24 of an unsupported type (cat/0.csv, cat/1.csv, cat/10.csv, cat/11.csv, cat/12.csv and 19" in (
        capsys.readouterr().out
    )


@each_script
def test_unicode_names_match_in_either_normal_form(name, tree, read, tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Löwe") for form in ("NFC", "NFD"))
    (tree / "train" / "dog").rename(tree / "train" / decomposed)
    for split in ("test", "val"):
        (tree / split / "dog").rename(tree / split / composed)
    assert sorted(read(name)[2].classes) == sorted(["cat", composed])
    model = create_model("convit_cifar_nano", num_classes=2)
    record = {"model": model.state_dict(), "model_config": vars(model.config), "classes": ["cat", decomposed]}
    torch.save(record, tmp_path / "weights.pt")
    assert open_model(tmp_path / "weights.pt").classes == ["cat", composed]


@each_script
def test_splits(name, tree, read):
    """An epoch drops its incomplete last batch, of two images."""
    other = {"test": "val", "val": "test"}[EVAL_SPLIT[name]]
    assert read(name)[:2] == (24, 6)
    for split in ("train", other):  # --eval reads nothing but the evaluation split
        for file in (tree / split).glob("*/*.png"):
            damage(file)
    assert read(name, "--eval")[:2] == (0, 6)
    shutil.rmtree(tree / "train")
    shutil.rmtree(tree / other)
    assert read(name, "--eval")[2].classes == ["cat", "dog"]
    (tree / EVAL_SPLIT[name]).rename(tree / "valid")
    assert read(name, "--eval")[1] == 6
    with pytest.raises(UserError, match="contains valid/, but no train/"):
        read(name)
    (tree / "valid").rename(tree / "train")
    trained, evaluated, data = read(name, "--val-fraction", "0.34")
    assert (trained, evaluated) == (4, 2) and data.eval_split == "validation"
    assert read(name, "--val-fraction", "0.34", "--eval")[:2] == (0, 2)
    for folder in list((tree / "train").iterdir()):
        folder.rename(tree / folder.name)
    (tree / "train").rmdir()
    assert read(name, "--val-fraction", "0.34")[:2] == (4, 2)


def test_evaluation_loads_a_single_split_of_cifar(read, monkeypatch):
    loaded = []

    def load_images(_, size: int, split: str) -> ImageSet:
        loaded.append(split)
        return ImageSet(torch.zeros(4, 3, size, size, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), ["a", "b"])

    monkeypatch.setattr("training.data.load_images", load_images)
    assert read("train_cifar", "--dataset", "cifar10", "--eval")[:2] == (0, 4)
    assert read("train_cifar", "--dataset", "cifar10", "--eval", "--val-fraction", "0.5")[:2] == (0, 2)
    assert loaded == ["test", "train"]
    assert read("train_cifar", "--dataset", "cifar10", "--eval", "--img-size", "96")[2].crop_pct == 1


@each_script
def test_held_out_images_are_cropped_for_evaluation(name, tree, read):
    split = ["--val-fraction", "0.25", "--img-size", "96"]
    data = read(name, *split)[2]
    for images, _, indices in data.eval_batches():
        for image, index in zip(images, indices.tolist(), strict=True):
            assert torch.equal(image, load_crop(data.eval_names[index], 96, 96, 0.875))


@each_script
def test_evaluation_images_may_lack_classes(name, tree, read, capsys):
    shutil.rmtree(tree / EVAL_SPLIT[name] / "cat")  # the first class: without it, "dog" would be 0
    labels = torch.cat([labels for _, labels, _ in read(name)[2].eval_batches()])
    assert labels.tolist() == [1, 1, 1] and "no evaluation images of cat" in capsys.readouterr().out


@each_script
def test_order_of_the_images_follows_epoch_and_seed(name, read):
    orders = set()
    for seed in (0, 1):
        data = read(name, "--seed", seed)[2]
        orders |= {tuple(torch.cat([labels for _, labels in data.train_batches(epoch)]).tolist()) for epoch in (1, 2)}
    assert len(orders) == 4


def test_heads_are_measured_on_evenly_spaced_images(read, monkeypatch):
    monkeypatch.setattr("training.data.NUM_SAMPLES", 2)
    data = read("train_cifar")[2]
    torch.testing.assert_close(data.sample_images, normalize(data.test.images[[0, -1]]))


@each_script
def test_unreadable_images(name, tree, read, capsys):
    (tree / "train" / "cat" / "0.png").write_bytes(b"")
    damage(tree / EVAL_SPLIT[name] / "dog" / "1.png")
    (tree / EVAL_SPLIT[name] / "dog" / "2.png").write_text("text")
    trained, evaluated, data = read(name, "--skip-bad-images")
    assert evaluated == 4 and trained == 24
    indices = torch.cat([indices for *_, indices in data.eval_batches()])
    files = [data.eval_names[index].name for index in indices.tolist()]
    assert files == ["0.png", "1.png", "2.png", "0.png"] and len(data.sample_images) == 4
    captured = capsys.readouterr()
    output = captured.out + captured.err
    assert all(output.count(reason) == 1 for reason in ("0.png is empty", "1.png is trunc", "2.png is not an image"))
    assert "left out" in output
    damage(tree / EVAL_SPLIT[name] / "cat" / "0.png")
    assert read(name, "--skip-bad-images", "--eval")[1] == 3


def test_train_cifar_names_all_unreadable_images_at_once(tree, read, capsys):
    bad = [tree / "train" / "cat" / f"{index}.png" for index in range(7)] + [next((tree / "test" / "dog").iterdir())]
    for file in bad:
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"8 of 30 images cannot be read: .* and 3 more; repair or remove"):
        read("train_cifar")
    output = capsys.readouterr().out
    assert all(f"note: {file} is empty\n" in output for file in bad)


@pytest.mark.parametrize("workers", [0, 1])
def test_folder_without_readable_images_ends_in_one_sentence(workers, tree, read):
    """Whether it is raised in the main process, or in a worker."""
    for file in tree.glob("*/*/*.png"):
        file.write_bytes(b"")
    flags = ["--workers", workers, "--skip-bad-images"]
    for name, message in (("train_cifar", "30 of 30 images cannot"), ("train_imagenet", "none of 24 files in a row")):
        with pytest.raises(UserError, match=message) as error:
            read(name, *flags)
        assert "\n" not in str(error.value) and "--skip-bad-images" not in str(error.value)


# errors that advise a flag, or an action: how to provoke them, the advice, and what to do if it is not a flag
ADVICE = {
    "no evaluation split": (lambda tree: [shutil.rmtree(tree / split) for split in ("test", "val")],
                            "--val-fraction 0.1", None),
    "no splits": (lambda tree: [shutil.rmtree(tree / split) for split in ("test", "val")]
                  + [folder.rename(tree / folder.name) for folder in [*(tree / "train").iterdir()]]
                  + [(tree / "train").rmdir()], "--val-fraction 0.1", None),
    "folder above": (lambda tree: (tree.rename(tree.parent / "inner"), tree.mkdir(),
                                   (tree.parent / "inner").rename(tree / "inner")), r"--data-dir \S+/inner", None),
    "other name": (lambda tree: [(tree / split).rename(tree / name) for split, name in
                                 (("train", "Training"), ("test", "Testing"), ("val", "Validation"))],
                   "rename Testing, Training, Validation",
                   lambda tree: [(tree / name).rename(tree / split) for split, name in
                                 (("train", "Training"), ("test", "Testing"), ("val", "Validation"))]),
    "empty class": (lambda tree: (tree / "train" / "bird").mkdir(), "or remove it",
                    lambda tree: (tree / "train" / "bird").rmdir()),
    "no class folders": (lambda tree: [shutil.move(file, tree / "train") for file in [*tree.glob("train/dog/*")]]
                         + [shutil.rmtree(tree / "train" / name) for name in ("cat", "dog")],
                         "put the images into",
                         lambda tree: [save_images(tree / "train" / name, 2) for name in ("cat", "dog")]),
    "skip": (lambda tree: damage(tree / "train" / "dog" / "3.png"), "--skip-bad-images", None),
    "remove": (lambda tree: damage(tree / "train" / "dog" / "3.png"), "repair or remove such files",
               lambda tree: (tree / "train" / "dog" / "3.png").unlink()),
    "nothing": (shutil.rmtree, "--dataset patterns", None),
}  # fmt: skip


@each_script
@pytest.mark.parametrize("fault", ADVICE)
def test_advice_can_be_followed(fault, name, tree, read, monkeypatch):
    monkeypatch.setattr("training.data.patterns", lambda count, split: patterns(count // 1000, split))
    provoke, advice, follow = ADVICE[fault]
    flags = []
    read(name, *flags)
    provoke(tree)
    with pytest.raises(UserError) as error:
        read(name, *flags)
    advised = re.search(advice, str(error.value))
    assert advised and "\n" not in str(error.value), error.value
    if follow:
        follow(tree)
    else:
        flags += advised[0].split()
    trained, evaluated, _ = read(name, *flags)
    assert trained and evaluated


def test_images_that_exceed_the_memory(tree, read, monkeypatch):
    def empty(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:122] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("training.data.torch.empty", empty)
    with pytest.raises(UserError, match=r"^24 images of 8 pixels do not fit into memory: use train_imagenet\.py$"):
        read("train_cifar")


@pytest.mark.parametrize(
    ("rank", "local_rank", "waits_before"), [(0, 0, 0), (1, 1, 2), (8, 0, 1), (9, 1, 2)], ids=["0", "1", "8", "9"]
)
def test_one_process_per_machine_downloads_after_rank_0(rank, local_rank, waits_before, monkeypatch):
    """Otherwise, two machines with a shared disk would write the same files."""
    calls, cifar = [], types.SimpleNamespace(data=np.zeros((1, 32, 32, 3), np.uint8), targets=[0], classes=["a"])
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr("training.data.barrier", lambda: calls.append("wait"))
    monkeypatch.setattr("training.data.cifar_class", lambda _: lambda *_, **__: calls.append("load") or cifar)
    load_images(train_cifar.Config(dataset="cifar10"), 32, "train")
    assert calls == ["wait"] * waits_before + ["load"] + ["wait"] * (2 - waits_before)


def test_training_images_are_augmented_and_repeated(read, monkeypatch):
    """Every repetition in every epoch has its own draw."""
    keys = []
    monkeypatch.setattr("training.image_folder.shard_batches", lambda new, *_: keys.extend(new.tolist()) or [])
    data = read("train_imagenet", "--aug-repeats", "3")[2]
    list(data.train_batches(2))  # `read` has requested epoch 1
    assert len({seed for _, seed in keys}) == len(keys) == 48 and len({index for index, _ in keys[24:]}) == 8
    assert (data.train.rand_augment, data.test.rand_augment) == (9, None)
    assert read("train_imagenet", "--rand-augment", "0")[2].train.rand_augment == 0


@pytest.mark.usefixtures("small_model", "no_plots")
@each_script
def test_run_goes_on_after_a_bad_image_is_removed(name, tree, tmp_path, capsys):
    script, once = SCRIPTS[name][0], {"aug_repeats": 1} if name == "train_imagenet" else {}

    def train(**values):
        tiny = {"model": "convit_cifar_nano", "img_size": 8, "patch_size": 4, "batch_size": 8, "warmup_epochs": 0}
        where = {"data_dir": tree, "run": tmp_path / "run", "device": "cpu", "workers": 0}
        script.train(script.Config(**tiny | where | once | {"epochs": 1} | values))
        return capsys.readouterr().out

    train()
    train(run=tmp_path / "split", val_fraction=0.25)
    train(run=tmp_path / "half", data_fraction=0.5)  # 12 of 24 images, and of 23
    bad = tree / "train" / "dog" / "3.png"
    damage(bad)
    for run in ("run", "split"):
        values = {"epochs": 2, "resume": True, "run": tmp_path / run, "val_fraction": 0.25 if run == "split" else None}
        with pytest.raises(UserError, match=r"3\.png is truncated or damaged") as error:
            train(**values)
        assert ("or remove" in str(error.value)) == (run == "run")
        assert name == "train_cifar" or str(error.value).endswith("then rerun with --resume")
    assert "started with" not in train(**values, skip_bad_images=True)
    bad.unlink()
    output = train(run=tmp_path / "half", data_fraction=0.5, epochs=2, resume=True)
    assert "there are 23 training (before --data-fraction) and 6 evaluation images, but" in output
    output = train(epochs=2, resume=True)
    assert "there are 23 training and 6 evaluation images, but" in output and "started with 24 and 6" in output
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [0, 3, 6]  # 23 images are 2 batches of 8
    with pytest.raises(UserError, match="restore the original files"):
        train(**values | {"epochs": 3})
    save_images(tree / "train" / "dog" / "new", 2)
    assert "there are 25 training" in train(epochs=3, resume=True)
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [0, 3, 6, 9]
    for split in ("train", "test", "val"):
        (tree / split / "cat").rename(tree / split / "zebra")  # now the last class
    with pytest.raises(
        UserError, match=r"classes differ from those of .*/run \(missing: cat; new: zebra\): restore them"
    ):
        train(epochs=4, resume=True)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A photo-like image whose four quarters differ, not square."""
    y, x = np.mgrid[0:96, 0:128]
    pixels = np.stack([255 * (x > 64), 255 * (y > 48), (x + y) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def png_of_16_bits(pixels: np.ndarray, transparent: bytes = b"") -> bytes:
    """A PNG in 16-bit RGB, or grayscale with a transparent value, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, *channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2 if channels else 0, 0, 0, 0))
    header += chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def save_as(kind: str, photo: Image.Image, folder: Path) -> tuple[Path, Image.Image]:
    """An image in some format, and what it should look like."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # rotate by 90 degrees clockwise to display, as for a phone held upright
    gray, on_its_side = photo.convert("L"), photo.transpose(Image.Transpose.ROTATE_90)
    name, _, suffix = kind.rpartition(" ")
    file, expected = folder / f"photo.{suffix}", photo
    if name == "rotated":
        on_its_side.save(file, exif=exif, quality=95)
    elif name == "large rotated":
        large = on_its_side.resize((4 * 768, 4 * 1024), Image.Resampling.BOX)
        large.save(file, exif=exif, quality=95, **{"save_all": True} if suffix == "mpo" else {})
        expected = large.transpose(Image.Transpose.ROTATE_270).resize((1024, 768), Image.Resampling.BOX)
    elif name == "gray":
        gray.save(file)
        expected = gray
    elif name == "16-bit":
        Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(file)
        expected = gray
    elif name == "16-bit RGB":
        file.write_bytes(png_of_16_bits(np.asarray(photo).astype(np.uint16) * 257))
    elif name == "16-bit transparent":
        pixels = np.asarray(gray).astype(np.uint16) * 257
        pixels[:, :64] = 3
        file.write_bytes(png_of_16_bits(pixels, transparent=b"\0\3"))
        expected = gray.copy()
        expected.paste("white", (0, 0, 64, 96))
    elif name == "damaged EXIF":
        photo.save(file, quality=95, dpi=(72, 72), exif=b"Exif\0\0damaged!")
    elif name.startswith("float"):
        peak = int(name.split()[1])
        Image.fromarray(np.asarray(gray, dtype=np.float32) / 255 * peak).save(file)
        expected = gray
    elif name == "transparent":
        image = photo.convert("RGBA")
        image.paste((0, 0, 0, 0), (0, 0, 64, 96))
        image.save(file)
        expected = photo.copy()
        expected.paste("white", (0, 0, 64, 96))
    else:
        photo.convert(name or "RGB").save(file, quality=95)
    return file, expected.convert("RGB")


FORMATS = ["P png", "gray png", "16-bit png", "16-bit RGB png", "16-bit transparent png", "transparent png",
           "rotated png", "rotated jpg", "damaged EXIF jpg", "large rotated jpg", "large rotated mpo", "CMYK jpg",
           " webp", "rotated webp", "P gif", "float 1 tiff", "float 255 tiff", "float 65535 tiff", "16-bit tiff",
           "rotated tiff", " bmp", " avif"]  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_read_alike_on_every_path(kind, photo, tmp_path):
    if kind == " avif" and not features.check("avif"):
        pytest.skip("this Pillow does not read AVIF")
    model = create_model("convit_cifar_nano", num_classes=2).eval()
    model.crop_pct, model.classes, model.epoch = 0.875, ["a", "b"], 1
    inspector = AttentionInspector("", [model])

    def read(file: Path) -> dict[str, np.ndarray]:
        one = ImageSet(np.array([file]), torch.zeros(1, dtype=torch.long), ["a"])
        dataset = ImageFolderDataset([file], torch.zeros(1), 32, crop_pct=0.875)
        torch.manual_seed(0)
        augmented = random_resized_crop(file, 32)
        data = inspector.prepare_image(file.read_bytes())
        return {
            "load_image": np.array(load_image(file)),
            "train_cifar": decode(one, 32, 1, 0.875)[0].images[0].permute(1, 2, 0).numpy(),
            "train_imagenet": dataset.read(file).permute(1, 2, 0).numpy(),
            "augmented": np.array(augmented),
            "predict": 64 * preprocess(model, file)[0].permute(1, 2, 0).numpy(),
            "page": np.frombuffer(inspector._decode_pixels(data["pixels"], 0), np.uint8).reshape(32, 32, 3),
        }

    file, expected = save_as(kind, photo, tmp_path)
    expected.save(tmp_path / "upright.png")
    found, upright = read(file), read(tmp_path / "upright.png")
    for path, pixels in found.items():
        if path == "augmented" and kind.startswith("large"):
            continue  # the size of an image determines the random crop
        if path == "load_image" and kind.startswith("large"):
            assert pixels.shape == (768, 1024, 3)  # decoded at a quarter of the scale
        assert pixels.shape == upright[path].shape
        difference = np.abs(pixels.astype(float) - upright[path]).mean()
        assert difference < (8 if kind[0] == "P" or "avif" in kind else 4), (path, difference)
    assert np.array_equal(found["train_cifar"], found["train_imagenet"])
    assert np.array_equal(found["train_cifar"], found["page"])


def test_float_images_are_clipped(tmp_path):
    """Values out of range, NaN, and infinities in an image of 0..1."""
    values = np.array([[-0.5, 0.5, 1.5, np.nan, np.inf, -np.inf]], dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert np.array(load_image(tmp_path / "a.tiff"))[0, :, 0].tolist() == [0, 127, 255, 0, 255, 0]


def test_reasons_are_told_apart(photo, tmp_path, monkeypatch):
    def reason(name: str, content: bytes | None = None) -> str:
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(name)) as error:
            load_image(file)
        return str(error.value).removeprefix(f"{file} ")

    photo.save(tmp_path / "photo.png")
    photo.save(tmp_path / "photo.jpg")
    png, jpg = ((tmp_path / f"photo.{suffix}").read_bytes() for suffix in ("png", "jpg"))
    assert reason("text.jpg", b"not an image") == "is not an image"
    assert reason("zeros.png", bytes(1000)) == "is not an image"
    assert reason("empty.jpg", b"") == "is empty"
    for name, start in (("a.heic", b"\0\0\0\x18ftypheic"), ("b.heic", b"\0\0\0\x18ftypmif1"), ("a.jxl", b"\xff\x0a")):
        assert reason(name, start + bytes(99)) == "has an unsupported format: convert it to JPEG or PNG"
    assert "a damaged header" in reason("a.avif", b"\0\0\0\x18ftypmif1\0\0\0\0avifmif1" + bytes(99))
    assert reason("cut.png", png[:-200]).startswith("is truncated or damaged (")
    assert reason("cut.jpg", jpg[:-200]).startswith("is truncated or damaged (")
    assert reason("begun.png", png[:12]) == "has a damaged header or an unsupported variant of its format"
    for name, content in (("a.heic", b"\0\0\0\x18ftypheic" + bytes(99)), ("a.svg", b"<?xml?><svg/>"),
                          ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")):  # fmt: skip
        assert reason(name, content).startswith("has an unsupported format: convert")
    assert reason("none.png") == "cannot be opened: No such file or directory"
    if os.getuid() == 0:  # root may read everything
        monkeypatch.setattr(Path, "read_bytes", raise_permission_error)
    else:
        (tmp_path / "photo.png").chmod(0)
    assert reason("photo.png") == "cannot be opened: Permission denied"
    monkeypatch.undo()
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    assert reason("huge.png") == "is too large to decode (the limit is 178,956,970 pixels)"


def raise_permission_error(file, *_, **__):
    raise PermissionError(13, "Permission denied", str(file))


def test_images_deep_in_class_folders_are_found(tmp_path):
    for name in ("cat", "dog"):
        save_images(tmp_path / name / "2024" / "summer" / "june", 1)
    assert infer_dataset(str(tmp_path), "data") == "folder"
    assert infer_dataset(str(tmp_path / "new"), str(tmp_path / "new")) == "cifar10"  # the default folder, still empty
