"""The benchmarks compare models of one shape, take turns, and write their results."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CONFIG, perturb
from PIL import Image

from benchmarks import data_loading, model, timing
from convit_min import MODELS


def run(benchmark, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [benchmark.__file__, *map(str, flags)])
    benchmark.main()


def test_all_variants_have_the_same_shape():
    pytest.importorskip("timm")
    for name in model.BATCH_SIZES["cpu"]:
        variants = {variant: model.build(variant, MODELS[name]) for variant in model.VARIANTS}
        sizes = {variant: sum(param.numel() for param in module.parameters()) for variant, module in variants.items()}
        assert max(sizes.values()) < 1.01 * min(sizes.values()), sizes
        images = torch.zeros(1, 3, *MODELS[name].image_shape)
        assert {module(images).shape for module in variants.values()} == {(1, MODELS[name].num_classes)}


def test_explicit_maps_give_the_same_logits():
    ours = perturb(model.build(model.OURS, CONFIG))
    explicit = model.build(model.EXPLICIT, CONFIG).eval()
    explicit.load_state_dict(ours.state_dict())
    is_explicit = [type(block.attn) is model.ExplicitGPSA for block in explicit.blocks]
    assert is_explicit == [index in CONFIG.gpsa_blocks for index in range(CONFIG.depth)]
    images = torch.randn(2, 3, *CONFIG.image_shape)
    with torch.no_grad():
        torch.testing.assert_close(explicit(images), ours(images), atol=1e-5, rtol=1e-4)


def test_timing_is_interleaved(monkeypatch):
    clock, calls = [0.0], []

    def take(name, seconds):
        calls.append(name)
        clock[0] += seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(timing, "MIN_SECONDS", 1.0)
    functions = {"slow": lambda: take("slow", 2.0), "fast": lambda: take("fast", 0.25)}
    assert timing.time_interleaved(functions, repetitions=3) == {"slow": 2.0, "fast": 0.25}
    warm_up = ["slow", "slow", "fast", "fast"]
    assert calls == warm_up + 3 * (["slow"] + 4 * ["fast"])


def test_quick_run_writes_a_row_per_variant(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "VARIANTS", [model.OURS, model.OUR_VIT])  # the others take longer
    monkeypatch.setattr(model, "BASELINE", model.OUR_VIT)
    run(model, monkeypatch, "--quick", "--device", "cpu", "--out", tmp_path)
    rows = json.loads((tmp_path / "model-cpu-fp32.json").read_text())["rows"]
    table = (tmp_path / "model-cpu-fp32.md").read_text()
    assert [row["variant"] for row in rows] == [model.OURS, model.OUR_VIT]
    for row in rows:
        assert f"| convit_cifar_nano | 32 | 8 | {row['variant']} |" in table
        assert row["memory"]["mib"] > 5
        assert all(row[mode]["images_per_second"] > 0 and 0 < row[mode]["of_peak"] < 2 for mode in ("infer", "train"))
    model.plot_scaling(rows).savefig(tmp_path / "scaling.png")


def test_invalid_image_size_is_a_usage_error(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(model, monkeypatch, "--device", "cpu", "--sizes", 30)
    assert "must be a multiple of patch_size" in capsys.readouterr().err


def test_data_loading_times_every_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # it would outlast this test
    with pytest.raises(SystemExit):
        run(data_loading, monkeypatch, tmp_path)
    assert str(tmp_path / "train") in capsys.readouterr().err

    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / name / "1.JPEG")
    run(data_loading, monkeypatch, tmp_path, "--out", tmp_path)
    seconds = json.loads((tmp_path / "data_loading.json").read_text())["seconds"]
    assert len(seconds) == 9 and all(f"| {name} |" in (tmp_path / "data_loading.md").read_text() for name in seconds)
