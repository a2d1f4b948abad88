"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest
import torch

DEMO = Path(__file__).parent.parent / "demo"

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
