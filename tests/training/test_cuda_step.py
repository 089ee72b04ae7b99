"""The step's levers on a CUDA device, where another library computes them: the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.config import Config, last_of_each, load_config
from dist_train.distributed.backends import make_backend
from dist_train.distributed.backends.base import Backend, autocast
from dist_train.models.norm import share_statistics
from dist_train.run.model import as_input, make_model
from dist_train.training.cuda_graphs import UNRECORDED, make_forward_backward
from dist_train.training.optimizer import make_optimizer

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
PLAIN = ("model.name=resnet3d-10", "model.width=16", "train.precision=fp32")


def config_of(*settings: str) -> Config:
    return load_config(None, last_of_each(["store=none", *PLAIN, *settings]))


def gradients(config: Config, *, shared: bool = False) -> list[torch.Tensor]:
    """Loss and gradients of one step from the same weights, on the device."""
    device = torch.device("cuda")
    model = make_model(config).to(device)
    if shared:
        share_statistics(model, lambda sums: None)
    generator = torch.Generator().manual_seed(1)
    clips = torch.randint(256, (4, 1, 20, 64, 64), dtype=torch.uint8, generator=generator)
    frames, labels = torch.tensor([20, 17, 20, 9]), torch.tensor([1.0, 0, 0, 0], device=device)
    with autocast(config.train.precision, device):
        logits = model(as_input(clips.to(device), config), frames)
    loss = binary_cross_entropy_with_logits(logits.float(), labels)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_near(found: list[torch.Tensor], exact: list[torch.Tensor], tolerance: float) -> None:
    """Gradients as one vector, as single ones near zero may differ by more; losses ten times
    closer."""
    torch.testing.assert_close(found[0], exact[0], rtol=tolerance / 10, atol=tolerance / 10)
    ours, theirs = (torch.cat([g.float().flatten() for g in of[1:]]) for of in (found, exact))
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance


@pytest.mark.parametrize(
    ("setting", "shared", "tolerance"),
    [
        ("train.channels_last=true", False, 1e-2),
        ("model.stem_folded=true", False, 1e-2),
        ("norm.fused=true", False, 1e-2),
        ("model.recompute=cheap", False, 1e-2),
        # Statistics that nobody else shares.
        ("norm.fused=false", True, 1e-2),
        ("norm.fused=true", True, 1e-2),
        # On a CPU rounding changes the gradient of random weights by a quarter.
        ("train.precision=bf16", False, 0.5),
    ],
)
def test_a_lever_changes_gradients_by_rounding_alone(
    monkeypatch: pytest.MonkeyPatch, setting: str, shared: bool, tolerance: float
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain = gradients(config_of("train.channels_last=false"))
    changed = gradients(config_of("train.channels_last=false", setting), shared=shared)
    assert_near(changed, plain, tolerance)


def made(*settings: str) -> Backend:
    config = config_of(*settings)
    backend = make_backend(config.train, clip_norm=None)
    backend.wrap(make_model(config), lambda model: make_optimizer(model, config.optim))
    backend.model.train()
    return backend


def update(backend: Backend) -> None:
    """Update by the same gradients each time. CUDA's convolutions would give different ones."""
    generator = torch.Generator(backend.device).manual_seed(1)
    for parameter in backend.module.parameters():
        random = torch.randn(parameter.shape, device=backend.device, generator=generator)
        # The fused kernel needs weights and gradients in the same layout, as training has them.
        parameter.grad = torch.empty_like(parameter).copy_(random)
    backend.update()


def test_the_fused_optimizer_makes_the_same_updates_and_goes_on_from_a_checkpoint() -> None:
    plain, fused, resumed = made(), made("optim.fused=true"), made("optim.fused=true")
    update(plain)
    update(fused)
    state = {name: tensor.clone() for name, tensor in fused.state(lambda name: True).items()}
    resumed.load_state(state, updates=1)
    for backend in (plain, fused, resumed):
        update(backend)
    for other in (plain, resumed):
        for our, their in zip(fused.module.parameters(), other.module.parameters(), strict=True):
            torch.testing.assert_close(our, their, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_recorded_passes_are_the_passes(fused: bool) -> None:
    """Three shapes in turn, the second one padded, until each is replayed; weights stay."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(20, None), (12, torch.tensor([12, 9, 12, 5])), (16, None)]
    batches = [
        (torch.randint(256, (4, 1, depth, 64, 64), dtype=torch.uint8, generator=generator), frames)
        for _ in range(UNRECORDED + 3)
        for depth, frames in shapes
    ]

    def passes(*settings: str) -> list[list[torch.Tensor]]:
        settings = (f"norm.fused={str(fused).lower()}", *settings)
        config, backend = config_of(*settings), made(*settings)
        step = make_forward_backward(backend, device_knows_frames=fused)
        labels, found = torch.tensor([1.0, 0, 0, 0], device=backend.device), []
        for clips, frames in batches:
            x = as_input(clips.to(backend.device), config)
            # Two micro-batches of a step, so that gradients are added up.
            losses = [step(x, frames, labels, 0.5)[1], step(x.flip(3), frames, labels, 0.5)[1]]
            kept = [p.grad.clone() for p in backend.module.parameters() if p.grad is not None]
            found.append([torch.stack(losses), *kept])
            backend.drop_gradients()
        backend.close()
        return found

    for replayed, eager in zip(passes("train.graphs=true"), passes(), strict=True):
        assert_near(replayed, eager, 2e-2)
