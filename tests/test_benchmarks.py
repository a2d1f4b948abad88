"""The benchmarks compare models of one shape, take turns, and write their results."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CONFIG, forkserver, perturb
from PIL import Image

from benchmarks import data_loading, model, timing
from convit_min import MODELS, ConViT


def run(benchmark, monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", [benchmark.__file__, *map(str, flags)])
    benchmark.main()


@pytest.mark.parametrize("name", ["convit_tiny", "convit_cifar_nano"])
def test_all_variants_have_the_same_shape(name):
    with torch.device("meta"):
        variants = [build(MODELS[name]) for build in model.VARIANTS.values()]
        sizes = [sum(param.numel() for param in module.parameters()) for module in variants]
        assert max(sizes) < 1.01 * min(sizes), sizes
        heads = {block.attn.num_heads for module in variants for block in module.blocks}
        assert heads == {MODELS[name].num_heads}
        images = torch.zeros(1, 3, *MODELS[name].image_shape)
        assert {module(images).shape for module in variants} == {(1, MODELS[name].num_classes)}


def test_explicit_maps_give_the_same_logits():
    ours, explicit = perturb(ConViT(CONFIG)), model.VARIANTS["ours, explicit maps"](CONFIG).eval()
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
    process = forkserver.Process(target=int)  # started before `compare` changes the environment
    process.start()
    process.join()
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # so that it is removed again
    names = ["ours", "ours, gpsa_layers=0"]
    monkeypatch.setattr(model, "VARIANTS", {name: model.VARIANTS[name] for name in names})  # the others take longer
    monkeypatch.setattr(model, "BASELINE", names[1])
    run(model, monkeypatch, "--quick", "--device", "cpu", "--out", tmp_path)
    rows = json.loads((tmp_path / "model-cpu-fp32.json").read_text())["rows"]
    table = (tmp_path / "model-cpu-fp32.md").read_text()
    assert [row["variant"] for row in rows] == names
    for row in rows:
        assert f"| convit_cifar_nano | 32 | 8 | {row['variant']} |" in table
        assert row["memory"]["mib"] > 5
        for mode in ("infer", "train"):
            speed, plain = row[mode]["images_per_second"], rows[1][mode]["images_per_second"]
            assert row[mode]["ratio"] == pytest.approx(speed / plain) and 0 < row[mode]["of_peak"] < 2
        assert row["memory"]["ratio"] == pytest.approx(row["memory"]["mib"] / rows[1]["memory"]["mib"])
    model.plot_scaling(rows).savefig(tmp_path / "scaling.png")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_several_compiled_models_on_a_gpu(tmp_path, monkeypatch):
    """The compiled code of one model does not count toward the recompile limit of the next."""
    names = ["convit_cifar_nano", "convit_cifar"]
    run(model, monkeypatch, "--quick", "--device", "cuda", "--compile", "--models", *names, "--out", tmp_path)
    rows = json.loads((tmp_path / "model-cuda-fp32-compiled.json").read_text())["rows"]
    assert len(rows) == 2 * len(model.VARIANTS) and all(row["memory"]["mib"] > 5 for row in rows)


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
    assert len(seconds) == 6 and all(f"| {name} |" in (tmp_path / "data_loading.md").read_text() for name in seconds)
