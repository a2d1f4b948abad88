"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch

from convit_min import ConViTConfig

DEMO = Path(__file__).parent.parent / "demo"
# a small model on a grid of 5 x 7 patches, 9 heads, two GPSA blocks and a plain one
CONFIG = ConViTConfig(img_size=(20, 28), patch_size=4, num_classes=5, dim=36, num_heads=9, depth=3, gpsa_layers=2)

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)


def perturb(model: torch.nn.Module) -> torch.nn.Module:
    """Move all weights away from their structured start, gates and positions the most, so that no term can hide."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if name.endswith(("gating_param", "pos_proj.weight", "pos_proj.bias")) else 0.02
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model.eval()
