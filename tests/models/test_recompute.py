import pytest
import torch
from torch import Tensor, nn

from dist_train.models.norm import BatchNorm3d, norms, share_statistics
from dist_train.models.recompute import run_part
from dist_train.models.resnet3d import ResNet3D

# Not 16 or 32 frames: where a layer comes to depth 2, oneDNN 3.12 leaves the weight gradient of its
# 3x3x3 convolutions unset in bfloat16, and no two runs are the same.
DEPTH = 40
FRAMES = [None, torch.tensor([40, 9, 26])]
PLANS = ["cheap", "block", "stage", ("block", "cheap", "none", "stage", "cheap")]
BASIC, BOTTLENECK = {"depth": 18, "width": 8}, {"depth": 50, "width": 4}


def random_clips(depth: int = DEPTH, size: int = 32) -> Tensor:
    return torch.randn(3, 1, depth, size, size, generator=torch.Generator().manual_seed(1))


def train_two_steps(model: ResNet3D, frames: Tensor | None, bfloat16: bool) -> list[Tensor]:
    """Loss, gradients, buffers and the random state after a step."""
    torch.manual_seed(2)
    left = []
    for _ in range(2):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(random_clips(), frames).square().mean()
        loss.backward()
        left += [loss.detach()]
        left += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        left += [b.clone() for b in model.buffers()]
        left += [torch.get_rng_state()]
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-3 * p.grad
    return left


@pytest.mark.parametrize("recompute", PLANS, ids=str)
@pytest.mark.parametrize(
    ("settings", "frames", "bfloat16"),
    [(BASIC, FRAMES[0], True), (BASIC, FRAMES[1], False), (BOTTLENECK, FRAMES[1], True)],
    ids=["basic-full-bfloat16", "basic-padded-float32", "bottleneck-padded-bfloat16"],
)
def test_recompute_changes_no_bit(make_model, settings, frames, bfloat16, recompute):
    plain = make_model(**settings, dropout=0.5)
    recomputed = make_model(**settings, dropout=0.5)
    recomputed.recompute = recompute
    expected = train_two_steps(plain, frames, bfloat16)
    left = train_two_steps(recomputed, frames, bfloat16)
    assert len(expected) == 2 * (2 + len([*plain.parameters()]) + len([*plain.buffers()]))
    assert [torch.equal(a, b) for a, b in zip(left, expected, strict=True)] == [True] * len(left)


@pytest.mark.parametrize(
    ("bfloat16", "recompute"), [*((False, plan) for plan in PLANS), (True, PLANS[-1])], ids=str
)
def test_recompute_changes_no_bit_of_shared_statistics(make_model, bfloat16, recompute):
    """Shared with a second process that has the same clips. In every mode there is one all-reduce
    per layer in the forward pass and one in the backward pass."""
    results, calls = [], []
    for modes in ("none", recompute):
        model = make_model(18, width=4, dropout=0.5, recompute=modes)
        summed = []
        share_statistics(model, lambda sums, summed=summed: summed.append(sums.mul_(2)))
        results.append(train_two_steps(model, FRAMES[1], bfloat16))
        calls.append(len(summed))
    assert [torch.equal(a, b) for a, b in zip(*results, strict=True)] == [True] * len(results[0])
    layers = len([*norms(model)])
    assert calls == [2 * 2 * layers] * 2


def test_random_numbers_inside_a_block_are_drawn_again():
    def run(recompute: bool) -> list[Tensor]:
        torch.manual_seed(0)
        block = nn.Sequential(
            nn.Conv3d(1, 4, 3), BatchNorm3d(4), nn.Dropout(0.5), nn.Conv3d(4, 1, 3)
        )
        x = random_clips(depth=6, size=6)
        y = run_part("block" if recompute else "none", [block], x)
        y.square().sum().backward()
        grads = [p.grad for p in block.parameters() if p.grad is not None]
        return [y, *grads, *block.buffers(), torch.get_rng_state()]

    results = zip(run(recompute=True), run(recompute=False), strict=True)
    assert all(torch.equal(a, b) for a, b in results)


@pytest.mark.parametrize(("training", "runs"), [(True, 2), (False, 1)])
def test_blocks_run_twice_in_training_only(make_model, training, runs):
    model = make_model(10, width=4, recompute="block").train(training)
    started = []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, __, i=i: started.append(i))
    model(random_clips()).sum().backward()
    assert [started.count(i) for i in range(4)] == [runs] * 4
    with torch.no_grad():
        assert not model(random_clips()).requires_grad
    assert len(started) == 4 * (runs + 1)


def saved_bytes(model: ResNet3D, clips: Tensor, frames: Tensor | None = None) -> int:
    """Bytes kept for the backward pass, without parameters and buffers."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(clips, frames)
    assert output.requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)


# Shares of what is kept without recomputing; padded clips are kept in full by "cheap", and only
# their real frames without.
@pytest.mark.parametrize(("recompute", "most"), [("cheap", 0.7), ("block", 0.4), ("stage", 0.15)])
@pytest.mark.parametrize("frames", FRAMES, ids=["full", "padded"])
def test_recompute_keeps_a_fraction_of_the_activations(make_model, frames, recompute, most):
    settings = {"depth": 50, "width": 8}
    plain = saved_bytes(make_model(**settings), random_clips(), frames)
    recomputed = saved_bytes(make_model(**settings, recompute=recompute), random_clips(), frames)
    assert recomputed < most * plain
