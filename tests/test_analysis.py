"""analysis.py against reference numbers of the paper and a slow loop."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import CONFIG, perturb

from analysis import head_statistics, mean_distance, uniform_non_locality
from convit_min import ConViT, create_model


def test_reference_distances():
    assert uniform_non_locality((14, 14)) == pytest.approx(7.281, abs=1e-3)
    assert uniform_non_locality((8, 8)) == pytest.approx(4.136, abs=1e-3)
    model = create_model("convit_tiny", depth=2, gpsa_layers=1)
    model.blocks[0].attn.qk.weight.data.zero_()  # content uniform, as it nearly is before training
    heads = head_statistics(model, torch.randn(1, 3, 224, 224))
    torch.testing.assert_close(heads.non_locality[0], torch.full((4,), 2.679), atol=1e-3, rtol=0)


def test_statistics_of_the_initialization():
    heads = head_statistics(ConViT(CONFIG), torch.randn(3, 3, 20, 28))
    taps = torch.tensor([[x, y] for x in (-1.0, 0.0, 1.0) for y in (-1.0, 0.0, 1.0)])
    for layer in (0, 1):
        torch.testing.assert_close(heads.center[layer], taps)
        torch.testing.assert_close(heads.strength[layer], torch.ones(9))
        torch.testing.assert_close(heads.gate[layer], torch.full((9,), 1 / (1 + math.exp(-1))))
    for reading in (heads.gate, heads.center, heads.strength):
        assert reading[2].isnan().all()  # plain attention has no position
    assert heads.non_locality.isfinite().all()


def test_center_is_nan_for_flat_and_avoided_for_negative_strength():
    model = ConViT(CONFIG)
    v_pos = model.blocks[0].attn.pos_proj.weight.data
    v_pos[0] = torch.tensor([1.0, 0.0, 0.0])
    v_pos[1] = torch.tensor([-4.0, 2.0, 1.0])
    heads = head_statistics(model, torch.randn(1, 3, 20, 28))
    assert heads.center[0, 0].isnan().all() and heads.strength[0, 0] == 0
    assert heads.center[0, 1].tolist() == [2.0, -1.0] and heads.strength[0, 1] == -1


def test_non_locality_uses_each_layers_own_input(monkeypatch):
    monkeypatch.setattr("analysis.MAP_ELEMENTS", 2 * 35**2)  # batches of two
    model, images = perturb(ConViT(replace(CONFIG, drop_path=0.5))).train(), torch.randn(5, 3, 20, 28)
    measured = head_statistics(model, images).non_locality
    assert model.training
    with torch.no_grad():
        attention = model.eval()(images, return_attention=True)[1]
    for layer, head in ((0, 3), (1, 8), (2, 0)):
        maps = attention[layer].mixed[:, head]
        if layer == 2:  # the class token, first, has no place
            maps = maps[:, 1:, 1:] / maps[:, 1:, 1:].sum(-1, keepdim=True)
        total = 0.0
        for query in range(35):
            for key in range(35):
                distance = math.hypot(query % 7 - key % 7, query // 7 - key // 7)
                total += maps[:, query, key].mean().item() * distance
        assert measured[layer, head].item() == pytest.approx(total / 35, rel=1e-4)


def test_identity_attention_has_zero_non_locality():
    eye = torch.eye(12).expand(2, 1, 12, 12)
    assert mean_distance(eye, (3, 4)).tolist() == [0.0]
