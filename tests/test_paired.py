"""Statistics of runs that are paired by seed, against values computed by hand, and the report."""

import pytest

from experiments.paired import accuracy_table, contrast, contrasts, holm, patterns_table, write_report

PROVENANCE = [{"device": "CPU", "torch": "2.14"}]


def run(accuracy: float, steps=(0, 10, 20)) -> dict:
    heads = {key: [[value] * 9] * 2 for key, value in (("gate", 0.6), ("strength", 1.0), ("non_locality", 2.0))}
    metrics = [{"step": step, "test_accuracy": accuracy, "train_loss": 1.0, "heads": heads} for step in steps]
    return {"metrics": metrics, "provenance": PROVENANCE}


def test_contrast_is_a_paired_t_test():
    result = contrast([1, 2, 3, 4, 5])
    assert result.mean == 3 and result.pairs == 5
    assert (result.low, result.high) == pytest.approx((3 - 2.7764 * 0.70711, 3 + 2.7764 * 0.70711), abs=1e-3)
    assert result.p == pytest.approx(0.01324, abs=1e-5)  # t = 4.2426, 4 degrees of freedom
    assert result.verdict(0.04) == "different"
    assert result.verdict(0.06) == "not told apart"
    close = contrast([0.1, -0.1, 0.2, -0.2, 0.0])
    assert close.p_equivalence == pytest.approx(1.46e-5, rel=0.02)  # t = 1.5 / 0.070711
    assert close.verdict(1.0) == "equivalent within 1.5 points"
    assert contrast([1.5, 1.5, 1.6, 1.4]).p_equivalence == pytest.approx(0.5)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_report_pairs_runs_by_seed(tmp_path):
    records = {}
    for seed, (convit, vit) in enumerate([(60, 56), (61, 58), (62, 57)]):
        records |= {f"convit-10%-seed{seed}": run(convit), f"vit-10%-seed{seed}": run(vit)}
        records |= {f"convit-100%-seed{seed}": run(70 + seed), f"vit-100%-seed{2 - seed}": run(72 - seed)}
    records |= {"convit-10%-seed7": run(0.0), "tune-convit-10%-lr0.001": run(0.0)}  # without a pair, and no seed
    records |= {"patterns-learned-seed0": run(99.5, steps=(0, 156)), "patterns-learned-seed1": run(50.0)}
    write_report(records, tmp_path)
    text = (tmp_path / "README.md").read_text()
    settings = {name: {} for name in ("convit-10%", "vit-10%", "convit-100%", "vit-100%")}
    for name, record in records.items():
        setting, _, seed = name.partition("-seed")
        settings.setdefault(setting, {})[int(seed or 0)] = record
    found = contrasts(settings)
    assert found["ConViT - plain ViT, 10%"] == contrast([4, 3, 5])
    assert found["lead on 10% - lead on 100%"] == contrast([4, 3, 5])  # the lead on 100% is 0
    assert "ConViT - gates frozen at 0.5, 10%" not in found
    assert "| plain ViT | 10% | 57.0 ± 2.5 | 3 | 56.0, 58.0, 57.0 |" in text
    assert "| learned | 0, never | 99.5, 50.0 | 1.000, 1.000 |" in text
    assert all(line in text for line in (*accuracy_table(settings), *patterns_table(settings)))
    assert {file.name for file in tmp_path.iterdir()} == {"README.md", "accuracy.png", "curves.png", "heads.png"}
