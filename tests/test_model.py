"""convit_min.py against independent references: the paper's numbers, timm, and a slow loop over the equation."""

import math
import runpy
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import CONFIG, ROOT, perturb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from convit_min import GPSA, MODELS, ConViT, ConViTConfig, create_model, kernel_shape, resize_pos_embed
from images import normalize
from training.checkpoint import save_weights
from training.config import freeze_gpsa
from weights import load_weights, open_model

PARAMETERS = {  # the authors' models, 1000 classes
    "convit_tiny": 5_710_512,
    "convit_tiny_plus": 9_972_912,
    "convit_small": 27_777_322,
    "convit_small_plus": 48_979_882,
    "convit_base": 86_540_040,
    "convit_base_plus": 153_134_856,
}
FLOPS = {  # Table 1: billions, and half a unit of the last digit it prints
    "convit_tiny": (1, 0.5),
    "convit_tiny_plus": (2, 0.5),
    "convit_small": (5.4, 0.05),
    "convit_small_plus": (10, 0.5),
    "convit_base": (17, 0.5),
    "convit_base_plus": (30, 0.5),
}


def small_config(**changes) -> ConViTConfig:
    return replace(CONFIG, **changes)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_of_the_paper(name):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert all(len(model.blocks[i].attn.gating_param) == model.config.num_heads for i in range(10))
    assert all(hasattr(model.blocks[i].attn, "qkv") for i in (10, 11))


@pytest.mark.parametrize("name", FLOPS)
def test_flops_of_the_paper(name):
    """Within 5% of Table 1, and of what its rounding hides.

    Counted are the multiply-adds of convolution, linear layers and P v. The two products of content attention are not:
    the table leaves them out (it has 4.3 G for DeiT-S, which is 4.6 G with them).
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.device("meta"):
        create_model(name)(torch.empty(1, 3, 224, 224))
    content_attention = 2 * MODELS[name].dim * (10 * 196**2 + 2 * 197**2)  # multiply-adds
    billions = (counter.get_total_flops() / 2 - content_attention) / 1e9
    printed, rounding = FLOPS[name]
    assert 0.95 * (printed - rounding) <= billions <= 1.05 * (printed + rounding)


@pytest.mark.parametrize("name", ["convit_tiny", "convit_small", "deit_tiny"])
def test_same_logits_as_timm(name, tmp_path):
    theirs = perturb(timm.create_model(name if "convit" in name else "deit_tiny_patch16_224"))
    torch.save(theirs.state_dict(), tmp_path / "timm.pt")
    ours = create_model(name).eval()
    load_weights(ours, tmp_path / "timm.pt")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected, logits = theirs(images), ours(images)
    assert expected.std() > 0.1  # the comparison is not of zeros
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(20, 28), (12, 8)])
def test_attention_maps_match_the_fast_path(shape):
    model = perturb(ConViT(small_config()))
    calls = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda _, args, result: calls.append((args[0], result[0])))
    with torch.no_grad():
        _, attention = model(torch.randn(2, 3, *shape), return_attention=True)
        n = math.prod(shape) // 16
        for block, (x, output), heads in zip(model.blocks, calls, attention, strict=True):
            gpsa = isinstance(block.attn, GPSA)
            tokens = n if gpsa else n + 1
            assert heads.content.shape == heads.mixed.shape == (2, 9, tokens, tokens)
            assert heads.gate.shape == (9,)
            assert (heads.position is not None) == gpsa
            for attention_map in (heads.content, heads.mixed) + ((heads.position,) if gpsa else ()):
                assert attention_map.min() >= 0
                torch.testing.assert_close(attention_map.sum(-1), torch.ones_like(attention_map[..., 0]))
            weight = block.attn.v.weight if gpsa else block.attn.qkv.weight[72:]
            v = (x @ weight.T).unflatten(2, (9, 4)).transpose(1, 2)
            explicit = block.attn.proj((heads.mixed @ v).transpose(1, 2).flatten(2))
            torch.testing.assert_close(explicit, output, atol=1e-5, rtol=0)
            if gpsa:
                g = heads.gate[:, None, None]
                torch.testing.assert_close(heads.mixed, (1 - g) * heads.content + g * heads.position)
            else:
                assert (heads.gate == 0).all() and torch.equal(heads.mixed, heads.content)


@pytest.mark.parametrize(("gate", "pure"), [(20.0, "position"), (-20.0, "content")])
def test_saturated_gate_leaves_one_map(gate, pure):
    model = perturb(ConViT(small_config()))
    with torch.no_grad():
        for block in model.blocks[:2]:
            block.attn.gating_param.fill_(gate)
        heads = model(torch.randn(1, 3, 20, 28), return_attention=True)[1][1]
    other = {"position": "content", "content": "position"}[pure]
    torch.testing.assert_close(heads.mixed, getattr(heads, pure).expand_as(heads.mixed), atol=1e-6, rtol=0)
    assert (heads.mixed - getattr(heads, other)).abs().max() > 0.1


def slow_position_map(v_pos, height, width):
    """P of one head in plain Python: for each query the softmax over keys of v_pos . (dx, dy, dx^2 + dy^2)."""
    rows = []
    for query in range(height * width):
        scores = []
        for key in range(height * width):
            dx, dy = key % width - query % width, key // width - query // width
            scores.append(v_pos[0] * dx + v_pos[1] * dy + v_pos[2] * (dx**2 + dy**2))
        weights = [math.exp(score - max(scores)) for score in scores]
        rows.append([weight / sum(weights) for weight in weights])
    return torch.tensor(rows)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    v_pos=st.lists(st.tuples(*[st.floats(-3, 3, width=32)] * 3), min_size=9, max_size=9),
)
def test_position_factors_match_the_equation_on_any_grid(height, width, v_pos):
    attn = ConViT(small_config()).blocks[0].attn
    with torch.no_grad():
        attn.pos_proj.weight.copy_(torch.tensor(v_pos))
        position_y, position_x = attn.position_factors((height, width))
    for head in range(9):
        expected = slow_position_map(v_pos[head], height, width)
        position = torch.kron(position_y[head], position_x[head]).float()
        torch.testing.assert_close(position, expected, atol=1e-5, rtol=1e-4)


def test_position_map_matches_the_equation():
    model = perturb(ConViT(small_config()))
    v_pos = model.blocks[0].attn.pos_proj.weight.double().tolist()
    with torch.no_grad():
        position = model(torch.randn(1, 3, 20, 28), return_attention=True)[1][0].position
    for head in range(9):
        torch.testing.assert_close(position[head], slow_position_map(v_pos[head], 5, 7), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("v_pos", "key"), [((3.0, 0.0, -0.1), (2, 6)), ((0.0, 3.0, -0.1), (4, 3)),
                                            ((4.0, 0.0, -2.0), (2, 4)), ((0.0, -4.0, -2.0), (1, 3))])  # fmt: skip
def test_dx_points_right_and_dy_down(v_pos, key):
    attn = ConViT(small_config()).blocks[0].attn
    with torch.no_grad():
        attn.pos_proj.weight.copy_(torch.tensor(v_pos))
        position_y, position_x = attn.position_factors((5, 7))
    assert (position_y[0, 2].argmax(), position_x[0, 3].argmax()) == key


@pytest.mark.parametrize("heads", [4, 9, 16])
def test_convolutional_init_matches_the_authors(heads):
    k = math.isqrt(heads)
    attn = ConViT(small_config(dim=144, num_heads=heads, locality_strength=0.5)).blocks[0].attn
    for column in range(k):
        for row in range(k):
            expected = [2 * (column - (k - 1) / 2), 2 * (row - (k - 1) / 2), -1]
            assert attn.pos_proj.weight[row + k * column].tolist() == [0.5 * value for value in expected]
    assert torch.equal(attn.v.weight, torch.eye(144))
    assert (attn.gating_param == 1).all()


def test_initial_heads_attend_to_the_taps_of_a_kernel():
    model = ConViT(small_config())
    with torch.no_grad():
        position = model(torch.randn(1, 3, 20, 28), return_attention=True)[1][0].position
    query = 2 * 7 + 3
    for head in range(9):
        key = position[head, query].argmax().item()
        assert (key // 7 - 2, key % 7 - 3) == (head % 3 - 1, head // 3 - 1)


def test_kernel_shape_of_non_square_head_counts():
    assert [kernel_shape(heads) for heads in (1, 2, 3, 6, 7, 12, 16)] == [
        (1, 1), (1, 2), (1, 3), (2, 3), (1, 7), (3, 4), (4, 4)]  # fmt: skip
    v_pos = ConViT(small_config(num_heads=6)).blocks[0].attn.pos_proj.weight
    centers = {(x / 2, y / 2) for x, y, _ in v_pos.tolist()}
    assert centers == {(x, y) for x in (-1, 0, 1) for y in (-0.5, 0.5)}


def test_ablations_are_config_fields():
    random = ConViT(small_config(conv_init=False)).blocks[0].attn
    assert random.v.weight.std() < 0.03 and random.pos_proj.weight.abs().max() < 0.1
    frozen = ConViT(small_config(gating="frozen", gate_init=0.0)).blocks[0].attn.gating_param
    assert not frozen.requires_grad and (frozen == 0).all()
    model = ConViT(small_config())
    freeze_gpsa(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(part in name for name in trained for part in (".qk.", ".v.", "pos_proj", "gating_param"))
    assert {"blocks.0.attn.proj.weight", "blocks.2.attn.qkv.weight", "blocks.0.mlp.fc1.weight"} <= trained


@pytest.mark.parametrize("changes", [{}, {"pool": "mean"}, {"pool": "mean", "gpsa_layers": 3}, {"gpsa_layers": 0}])
def test_every_parameter_gets_a_gradient(changes):
    model = perturb(ConViT(small_config(**changes))).train()
    F.cross_entropy(model(torch.randn(4, 3, 20, 28)), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        if name.endswith("pos_proj.bias"):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_position_bias_cancels():
    model, images = perturb(ConViT(small_config())), torch.randn(1, 3, 20, 28)
    before = model(images)
    for block in model.blocks[:2]:
        block.attn.pos_proj.bias.data.add_(5)
    assert torch.equal(model(images), before)


def test_initialization_has_the_statistics_of_timms():
    theirs = timm.create_model("convit_tiny").state_dict()
    for name, value in create_model("convit_tiny").state_dict().items():
        assert value.mean().item() == pytest.approx(theirs[name].mean().item(), abs=0.01), name
        assert value.std().item() == pytest.approx(theirs[name].std().item(), rel=0.25, abs=1e-9), name


def test_gpsa_keeps_one_copy_of_v_for_the_backward_pass():
    """Distinct numbers that a layer saves, in activations: the input, q, k, v, both outputs, their mix, and a few."""
    model, tokens = create_model("convit_cifar_nano"), torch.randn(64, 64, 144, requires_grad=True)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: saved.setdefault(value.untyped_storage().data_ptr(), value), lambda value: value
    ):
        model.blocks[0].attn(tokens, (8, 8))
    assert sum(value.untyped_storage().nbytes() for value in saved.values()) < 9.1 * 4 * tokens.numel()


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    model = ConViT(small_config(drop_path=0.5)).train()
    assert [block.drop_path.p for block in model.blocks] == [0, 0.25, 0.5]
    dropped = model.blocks[2].drop_path(torch.ones(4000, 2, 3))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert (dropped.flatten(1).amin(1) == dropped.flatten(1).amax(1)).all()
    assert 0.9 < dropped.mean() < 1.1
    block, tokens = model.blocks[2], torch.randn(2, 35, 36)
    block.drop_path.p = 1.0
    assert torch.equal(block(tokens, (5, 7))[0], tokens)  # neither attention nor MLP is left
    assert torch.equal(model.eval().blocks[2].drop_path(torch.ones(3, 2, 3)), torch.ones(3, 2, 3))


def test_autocast_and_half_follow_float32():
    model, images = perturb(ConViT(small_config())), torch.randn(2, 3, 20, 28)
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            logits, attention = model(images, return_attention=True)
            assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
            assert attention[0].mixed.dtype == torch.float32
        assert (model.half()(images.half()) - expected).abs().max() < 0.02 * expected.abs().max()
        assert model(images.half(), return_attention=True)[1][0].mixed.isfinite().all()


def test_compile_matches_eager():
    """The graphs of a training step; generating code from them takes half a minute, and is PyTorch's concern."""
    model, images = perturb(ConViT(small_config())).train(), torch.randn(2, 3, 20, 28)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        logits = forward(images)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), parameters)])
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_traced_model_takes_another_batch():
    model = perturb(ConViT(small_config()))
    traced = torch.jit.trace(model, torch.randn(2, 3, 20, 28))
    images = torch.randn(5, 3, 20, 28)
    with torch.no_grad():
        torch.testing.assert_close(traced(images), model(images))


def test_float64_is_float64_throughout():
    """Finite differences, which float32 would not resolve, against the gradients of v_pos and the resized pos_embed."""
    attn = perturb(ConViT(small_config(dim=9))).blocks[0].attn.double()
    x = torch.randn(1, 6, 9, dtype=torch.float64)

    def output(v_pos: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(attn, {"pos_proj.weight": v_pos}, (x, (2, 3)))[0]

    assert torch.autograd.gradcheck(output, torch.randn(9, 3, dtype=torch.float64, requires_grad=True))
    pos_embed = torch.randn(1, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda pos_embed: resize_pos_embed(pos_embed, (2, 3), (3, 2)), pos_embed)


def test_float32_model_computes_nothing_in_float64():
    """Apple's GPUs do not have it."""

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            assert getattr(result, "dtype", None) != torch.float64, function
            return result

    model = ConViT(small_config())
    with NoFloat64():
        model(torch.randn(1, 3, 12, 36), return_attention=True)[0].sum().backward()


def test_half_precision_at_a_different_size():
    model, images = perturb(ConViT(small_config())), torch.randn(1, 3, 12, 36)
    with torch.no_grad():
        expected = model(images)
        for dtype in (torch.float16, torch.bfloat16):
            error = (model.to(dtype)(images.to(dtype)) - expected).abs().max()
            assert error < 0.05 * expected.abs().max()


def test_grayscale_images():
    pixels = torch.randint(256, (2, 1, 20, 28), dtype=torch.uint8)
    images = normalize(pixels)
    torch.testing.assert_close(images, (pixels / 255 - 0.449) / 0.226)  # the averages of ImageNet's mean and std
    assert ConViT(small_config(in_chans=1))(images).shape == (2, 5)
    with pytest.raises(ValueError, match="4 channels"):
        normalize(torch.zeros(1, 4, 20, 28))


@pytest.mark.parametrize("size", [[20, 28], (np.int64(20), np.int32(28)), np.int64(20)])
def test_sizes_may_be_lists_or_numpy_integers(size, tmp_path):
    trained = perturb(ConViT(small_config(img_size=size)))
    save_weights(trained, list("abcde"), 1.0, 1, tmp_path / "weights.pt")
    opened, images = open_model(tmp_path / "weights.pt"), torch.randn(1, 3, *trained.config.image_shape)
    assert opened.config.image_shape == trained.config.image_shape
    with torch.no_grad():
        assert torch.equal(opened(images), trained(images))


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_forward_features_are_what_the_head_reads(pool):
    model, images = perturb(ConViT(small_config(pool=pool))), torch.randn(2, 3, 20, 28)
    with torch.no_grad():
        patch_tokens, cls_token = model.forward_features(images)
        features = patch_tokens.mean(dim=1) if pool == "mean" else cls_token
        torch.testing.assert_close(model.head(features), model(images))
    assert patch_tokens.shape == (2, 35, 36) and (cls_token is None) == (pool == "mean")


def test_fifty_steps_give_the_losses_of_timm():
    theirs = timm.models.convit.ConVit(
        img_size=16, patch_size=4, num_classes=5, embed_dim=4, depth=3, num_heads=9, local_up_to_layer=2, mlp_ratio=2
    )
    ours = ConViT(small_config(img_size=16, mlp_ratio=2.0))
    ours.load_state_dict(perturb(theirs).state_dict())
    images, labels = torch.randn(50, 8, 3, 16, 16), torch.randint(0, 5, (50, 8))
    losses = []
    for model in (theirs.train(), ours.train()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses.append([])
        for step in range(50):
            loss = F.cross_entropy(model(images[step]), labels[step])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert max(losses[0]) - min(losses[0]) > 0.5  # the weights change
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_running_the_file_prints_the_maps_of_a_head(capsys):
    runpy.run_path(str(ROOT / "convit_min.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "gate 0.73" in output and [line[0] for line in output.splitlines() if line[0] in "CPA"] == ["C", "P", "A"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gpu_matches_cpu(dtype):
    model, images = perturb(create_model("convit_cifar_nano")), torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        model, images = model.cuda(), images.cuda()
        for forward in (model, torch.compile(model, fullgraph=True)):
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                error = (forward(images).float().cpu() - expected).abs().max()
            assert error < (1e-3 if dtype == torch.float32 else 0.05) * expected.abs().max()
        x = model.patch_embed(images).flatten(2).mT
        output, heads = model.blocks[0].attn(x, (8, 8), return_attention=True)
        v = model.blocks[0].attn.v(x).unflatten(2, (9, -1)).transpose(1, 2)
        explicit = model.blocks[0].attn.proj((heads.mixed @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(explicit, output, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("changes", "words"), [
    ({"dim": 100}, "dim=100 must be a multiple of num_heads=9"),
    ({"img_size": 30}, "must be a multiple of patch_size=4"),
    ({"img_size": (20, 30)}, "must be a multiple of patch_size=4"),
    ({"gpsa_layers": 4}, "gpsa_layers=4 must be 0 to depth=3"),
    ({"gpsa_layers": 3}, 'set pool="mean"'),
    ({"dim": 100, "pool": "max"}, "num_heads=9; pool='max'"),
    ({"pool": "max"}, "pool='max'"),
    ({"gating": "off"}, "gating='off'"),
    ({"drop_path": 1.0}, "drop_path=1.0"),
    ({"num_heads": 0}, "must be positive"),
    ({"num_classes": -1}, "num_classes, which must be at least 0"),
    ({"mlp_ratio": 0}, "must be positive"),
])  # fmt: skip
def test_invalid_config_says_what_to_change(changes, words):
    with pytest.raises(ValueError) as caught:
        small_config(**changes)
    assert words in str(caught.value)


def test_unknown_models_and_indivisible_images_are_refused():
    with pytest.raises(ValueError, match="convit_tiny"):
        create_model("convit_tinny")
    with pytest.raises(ValueError, match="patch_size=4"):
        ConViT(small_config())(torch.randn(1, 3, 21, 28))


def test_plain_models_have_the_shape_of_their_counterparts():
    """DeiT's position embedding has one more row, for the class token."""
    for name in ("cifar_nano", "cifar"):
        assert MODELS[f"vit_{name}"] == replace(MODELS[f"convit_{name}"], gpsa_layers=0)
    for name in ("deit_tiny", "deit_small", "deit_base"):
        with torch.device("meta"):
            ours, theirs = create_model(name), timm.create_model(f"{name}_patch16_224")
        sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, theirs)]
        assert sizes[0] + ours.config.dim == sizes[1]
        assert ours.config.num_heads == theirs.blocks[0].attn.num_heads


def test_positions_far_away_are_exact_in_half_precision():
    attn = ConViT(small_config()).blocks[0].attn
    attn.pos_proj.weight.data[0] = torch.tensor([66.0, 0.0, -3.0])  # 11 patches to the right; exact in bfloat16
    expected = attn.position_factors((1, 20))[1][0]
    torch.testing.assert_close(attn.bfloat16().position_factors((1, 20))[1][0], expected)


def test_gpsa_works_by_itself():
    torch.manual_seed(0)
    attn = GPSA(small_config(gate_init=0))
    assert (attn.gate() == 0.5).all() and attn(torch.randn(1, 35, 36), (5, 7))[0].isfinite().all()
