"""That benchmark.py compares like with like, and that its commands work."""

import json
import sys

import pytest
import torch
from conftest import CONFIG, perturb

import benchmark
from convit_min import MODELS


def test_all_rows_are_of_one_shape():
    pytest.importorskip("timm")
    for name in benchmark.CPU_BATCH:
        models = {variant: benchmark.build(variant, MODELS[name]) for variant in benchmark.VARIANTS}
        sizes = {variant: sum(value.numel() for value in model.parameters()) for variant, model in models.items()}
        assert max(sizes.values()) < 1.01 * min(sizes.values()), sizes
        widths = {model(torch.zeros(1, 3, *MODELS[name].image_shape)).shape for model in models.values()}
        assert len(widths) == 1


def test_the_explicit_form_gives_the_same_logits():
    ours = perturb(benchmark.build(benchmark.OURS, CONFIG))
    explicit = benchmark.build(benchmark.EXPLICIT, CONFIG).eval()
    explicit.load_state_dict(ours.state_dict())
    assert sum(type(block.attn) is benchmark.ExplicitGPSA for block in explicit.blocks) == CONFIG.gpsa_layers
    images = torch.randn(2, 3, *CONFIG.image_shape)
    with torch.no_grad():
        torch.testing.assert_close(explicit(images), ours(images), atol=1e-5, rtol=1e-4)


def test_quick_writes_a_table_for_every_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PRESENT", [benchmark.OURS, benchmark.OUR_VIT])  # the others take long
    monkeypatch.setattr(benchmark, "PLAIN", benchmark.OUR_VIT)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--quick", "--device", "cpu", "--out", str(tmp_path)])
    benchmark.main()
    written = json.loads((tmp_path / "benchmark-cpu-fp32.json").read_text())
    assert [row["variant"] for row in written["rows"]] == [benchmark.OURS, benchmark.OUR_VIT]
    for row in written["rows"]:
        assert row["memory"]["mib"] > 5
        assert all(row[mode]["images_per_second"] > 0 and 0 < row[mode]["of_peak"] < 2 for mode in ("infer", "train"))
    assert "not installed" in (tmp_path / "benchmark-cpu-fp32.md").read_text()

    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--sizes", "30"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "img_size (30, 30) must be a multiple of patch_size" in capsys.readouterr().err
