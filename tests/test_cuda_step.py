"""The step's levers on a CUDA device, where another library computes them: the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from dist_train.config import Config, load_config
from dist_train.engine.backends import make_backend
from dist_train.engine.backends.base import Backend, autocast
from dist_train.engine.graphs import UNRECORDED, make_micro_step
from dist_train.engine.micro_step import MicroStep
from dist_train.engine.optim import make_optimizer
from dist_train.models.norm import share_statistics
from dist_train.run import as_input, make_model

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
PLAIN = ("model.name=resnet3d-10", "model.width=16", "train.precision=fp32")


def config_of(*settings: str) -> Config:
    return load_config(None, ["store=none", *PLAIN, *settings])


def trained(config: Config, steps: int = 3, *, shared: bool = False) -> list[torch.Tensor]:
    """Loss of each step and the weights after them, on the device, in TF32-free arithmetic."""
    device = torch.device("cuda")
    model = make_model(config).to(device)
    if shared:
        share_statistics(model, lambda sums: None)
    optimizer = make_optimizer(model, config.optim)
    generator = torch.Generator().manual_seed(1)
    clips = torch.randint(256, (4, 1, 20, 64, 64), dtype=torch.uint8, generator=generator)
    frames, labels = torch.tensor([20, 17, 20, 9]), torch.tensor([1.0, 0, 0, 0], device=device)
    losses = []
    for _ in range(steps):
        with autocast(config.train.precision, device):
            logits = model(as_input(clips.to(device), config), frames)
        loss = binary_cross_entropy_with_logits(logits.float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [torch.stack(losses), *(parameter.detach() for parameter in model.parameters())]


@pytest.mark.parametrize(
    ("setting", "tolerance"),
    [
        ("train.channels_last=true", 2e-3),
        ("model.stem_folded=true", 2e-3),
        ("optim.fused=true", 2e-3),
        ("norm.fused=true", 2e-3),
        ("model.recompute=cheap", 2e-3),
        ("train.precision=bf16", 5e-2),
    ],
)
def test_a_lever_changes_the_first_losses_by_rounding_alone(
    monkeypatch: pytest.MonkeyPatch, setting: str, tolerance: float
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain = trained(config_of("train.channels_last=false"))[0]
    changed = trained(config_of("train.channels_last=false", setting))[0]
    torch.testing.assert_close(changed, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fused", ["false", "true"])
def test_shared_norms_are_the_norms_where_nobody_shares(
    monkeypatch: pytest.MonkeyPatch, fused: str
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain = trained(config_of())[0]
    shared = trained(config_of(f"norm.fused={fused}"), shared=True)[0]
    torch.testing.assert_close(shared, plain, rtol=2e-3, atol=2e-3)


def test_the_fused_optimizer_goes_on_from_a_checkpoint() -> None:
    config = config_of("optim.fused=true")

    def backend() -> Backend:
        made = make_backend(config.train, clip_norm=None)
        torch.manual_seed(0)
        made.wrap(make_model(config), lambda model: make_optimizer(model, config.optim))
        made.model.train()
        return made

    def step(on: Backend) -> None:
        generator = torch.Generator().manual_seed(1)
        clips = torch.rand(4, 1, 8, 32, 32, generator=generator).to(on.device)
        MicroStep(on)(clips, None, torch.tensor([1.0, 0, 0, 0], device=on.device), 1.0)
        on.update()

    first, second = backend(), backend()
    step(first)
    second.load_state({n: t.clone() for n, t in first.state(lambda name: True).items()}, updates=1)
    step(first)
    step(second)
    for ours, theirs in zip(first.module.parameters(), second.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_recorded_passes_are_the_passes(fused: bool) -> None:
    """Shapes in turn, of which the second has padding, until each was replayed."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(20, None), (12, torch.tensor([12, 9, 12, 5])), (16, None)]
    batches = [
        (torch.randint(256, (4, 1, depth, 64, 64), dtype=torch.uint8, generator=generator), frames)
        for _ in range(UNRECORDED + 3)
        for depth, frames in shapes
    ]

    def losses(*settings: str) -> torch.Tensor:
        config = config_of("optim.fused=true", f"norm.fused={str(fused).lower()}", *settings)
        backend = make_backend(config.train, clip_norm=1.0)
        torch.manual_seed(0)
        backend.wrap(make_model(config), lambda model: make_optimizer(model, config.optim))
        backend.model.train()
        step = make_micro_step(backend, device_knows_frames=fused)
        labels, found = torch.tensor([1.0, 0, 0, 0], device=backend.device), []
        for clips, frames in batches:
            x = as_input(clips.to(backend.device), config)
            # Two micro-batches of a step, so that gradients are added up.
            found += [step(x, frames, labels, 0.5)[1], step(x.flip(3), frames, labels, 0.5)[1]]
            backend.update()
        backend.close()
        return torch.stack(found)

    torch.testing.assert_close(losses("train.graphs=true"), losses(), rtol=2e-3, atol=2e-3)
