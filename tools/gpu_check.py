"""Does everything work, and how fast is a step: the first minute of tools/gpu.py on a card.

The most informative steps come first. Imports of this repository are inside the steps, so that a
missing package only fails the steps that need it.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from gpu_record import Record
from torch import Tensor
from torch.nn.functional import batch_norm as torch_batch_norm
from torch.nn.functional import conv3d

if TYPE_CHECKING:
    from bench_step import Row

#: They import all packages that training and prediction need.
MODULES = ("dist_train.training.train", "dist_train.evaluation.predict")
#: Largest relative error, by norms, of bf16 against float32 or other orders of bf16 sums.
TOLERANCE = 2e-2
DTYPES = torch.bfloat16, torch.float32


def steps(record: Record) -> dict[str, Callable[[Record], None]]:
    """The steps by name."""
    frames, deepest = (6, 24) if record.tiny else (60, 434)
    return {
        "imports": imports,
        "convolution": convolution,
        "batch_norm": batch_norm,
        f"fast 4x{frames}": partial(fast, 4, frames),
        f"fast 16x{frames}": partial(fast, 16, frames),
        f"fast 16x{frames}, kernels searched": partial(searched, 16, frames),
        f"memory 1x{deepest}": partial(memory, 1, deepest, "none"),
        f"memory 4x{deepest}": partial(memory, 4, deepest, "none"),
        f"memory 4x{deepest} cheap": partial(memory, 4, deepest, "cheap"),
        "graph": graph,
    }


def imports(record: Record) -> None:
    for module in MODULES:
        importlib.import_module(module)
    record.line()


# --- operations -----------------------------------------------------------------------------------


def convolution(record: Record) -> None:
    """Compare a 3x3x3 convolution in bf16, forward and backward, with float32 without TF32."""
    from roofline import best

    device, layout = torch.device(record.device), torch.channels_last_3d
    clips, channels, *size = (2, 8, 8, 12, 12) if record.tiny else (4, 64, 60, 40, 40)
    torch.manual_seed(0)
    x, y_grad = (
        torch.randn(clips, channels, *size, device=device).bfloat16().to(memory_format=layout)
        for _ in range(2)
    )
    weight = torch.randn(channels, channels, 3, 3, 3, device=device) / (27 * channels) ** 0.5
    weight = weight.bfloat16().to(memory_format=layout)

    def passes(dtype: torch.dtype) -> list[Tensor]:
        clips, kernel = (tensor.to(dtype).requires_grad_() for tensor in (x, weight))
        y = conv3d(clips, kernel, padding=1)
        return [y.detach(), *torch.autograd.grad(y, (clips, kernel), y_grad.to(dtype))]

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = passes(torch.float32)
    errors = differences(("forward", "input", "weight"), passes(torch.bfloat16), exact)
    bf16, fp32 = (best(partial(passes, dtype), device) * 1e3 for dtype in DTYPES)
    record.line(errors=errors, bf16_ms=bf16, fp32_ms=fp32)
    must_agree(errors)


def batch_norm(record: Record) -> None:
    """Compare batch_norm of a channels-last bf16 clip as 5-D and as 4-D, which alone uses cuDNN."""
    from roofline import best

    device = torch.device(record.device)
    shape = (2, 8, 4, 8, 8) if record.tiny else (4, 64, 60, 80, 80)
    torch.manual_seed(0)
    x, y_grad = (
        torch.randn(shape, device=device).bfloat16().to(memory_format=torch.channels_last_3d)
        for _ in range(2)
    )
    weight, bias = torch.rand(2, shape[1], device=device)

    def passes(flat: bool) -> list[Tensor]:
        mean, variance = torch.zeros(2, shape[1], device=device)
        clips, scale, shift = (t.detach().requires_grad_() for t in (x, weight, bias))
        inputs = clips, scale, shift
        given = clips.flatten(2, 3) if flat else clips
        y = torch_batch_norm(given, mean, variance, scale, shift, training=True).view(shape)
        grads = torch.autograd.grad(y, inputs, y_grad)
        return [y.detach(), mean, variance, *grads]

    names = ("forward", "running_mean", "running_variance", "input", "weight", "bias")
    errors = differences(names, passes(True), passes(False))
    record.line(
        errors=errors,
        ms_5d=best(partial(passes, False), device) * 1e3,
        ms_4d=best(partial(passes, True), device) * 1e3,
    )
    must_agree(errors)


def differences(
    names: Sequence[str], found: Sequence[Tensor], exact: Sequence[Tensor]
) -> dict[str, float]:
    """Norm of the difference over that of ``exact``."""
    return {
        name: float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12))
        for name, a, b in zip(names, found, exact, strict=True)
    }


def must_agree(errors: dict[str, float]) -> None:
    # "not <=" is true for NaN, too.
    bad = [f"{name} by {error:.2g}" for name, error in errors.items() if not error <= TOLERANCE]
    if bad:
        raise ArithmeticError(f"results differ by more than {TOLERANCE}: {', '.join(bad)}")


# --- whole steps ----------------------------------------------------------------------------------


def model_of(record: Record) -> tuple[str, list[str]]:
    """The model of all steps, and settings that replace those of a row."""
    if not record.tiny:
        return "resnet3d-101", []
    # bf16 is emulated on most CPUs.
    precision = "fp32" if record.device == "cpu" else "bf16"
    tiny = ["model.width=4", "clip.size=[32, 32]", f"train.precision={precision}"]
    return "resnet3d-10", tiny


@contextmanager
def row_of(record: Record, name: str, *settings: str) -> Iterator[Row]:
    """A row of bench_step.py with other settings; its memory is free afterwards."""
    from bench_step import Row, config_of

    model, more = model_of(record)
    # An error of the step before may have kept memory.
    free_memory(record)
    row = Row(config_of(name, model, [*more, *settings]))
    try:
        yield row
    finally:
        row.close()
        # The caller still refers to the row: drop its tensors.
        row.__dict__.clear()
        free_memory(record)


def free_memory(record: Record) -> None:
    gc.collect()
    if record.device == "cuda":
        torch.cuda.empty_cache()


def fast(clips: int, frames: int, record: Record) -> None:
    """Time ten steps with the settings of bench_step.py's row ``fast``."""
    import numpy as np
    from bench_step import PARTS, make_batch

    count = 2 if record.tiny else 10
    depths = np.full(clips, frames)
    with row_of(record, "fast", f"plan.batch={clips}") as row:
        row.warm_up(make_batch(depths, row.config, cuda=record.device == "cuda"))
        turn = row.turn([depths] * count)
    record.line(
        clips_per_second=clips * count / turn.seconds,
        reserved_gb=turn.peak / 1e9,
        ms={part: getattr(turn, part) / count * 1e3 for part in PARTS},
        steps=count,
    )


def searched(clips: int, frames: int, record: Record) -> None:
    """The same, where cuDNN tries all its kernels in the first step: worth it for few depths."""
    torch.backends.cudnn.benchmark = True
    try:
        fast(clips, frames, record)
    finally:
        torch.backends.cudnn.benchmark = False


def memory(clips: int, frames: int, recompute: str, record: Record) -> None:
    """Measure the peak memory reserved by a step. Running out of memory is a result, too."""
    import numpy as np

    from dist_train.distributed.out_of_memory import is_out_of_memory
    from dist_train.system.advice import first_line

    try:
        with row_of(record, "fast", f"model.recompute={recompute}") as row:
            turn = row.turn([np.full(clips, frames)])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        record.line(reserved_gb=None, out_of_memory=first_line(error))
    else:
        record.line(reserved_gb=turn.peak / 1e9, seconds=turn.seconds)


def graph(record: Record) -> None:
    """Compare gradients of a step replayed as a CUDA graph with those of the eager step."""
    if record.device == "cpu":
        record.skip("CUDA graphs need CUDA")
        return
    import numpy as np
    from bench_step import make_batch
    from roofline import best

    from dist_train.run.model import as_input
    from dist_train.training.cuda_graphs import UNRECORDED

    depths = np.full(4, 6 if record.tiny else 60)
    found: dict[str, Any] = {}
    grads: dict[str, Tensor] = {}
    batch = None
    for name in ("eager", "replayed"):
        setting = f"train.graphs={str(name == 'replayed').lower()}"
        with row_of(record, "fast", setting) as row:
            if batch is None:
                batch = make_batch(depths, row.config, cuda=True)
            moved = batch.to(row.device)
            clips = as_input(moved.volumes, row.config)

            def passes(
                row: Row = row, clips: Tensor = clips, labels: Tensor = moved.labels
            ) -> None:
                row.backend.drop_gradients()
                row.passes(clips, None, labels, 1.0)

            for _ in range(UNRECORDED + 2):
                passes()
            kept = [p.grad.flatten() for p in row.backend.module.parameters() if p.grad is not None]
            grads[name] = torch.cat(kept)
            found[f"{name}_ms"] = best(passes, row.device) * 1e3
            del kept, clips, moved, passes
    errors = differences(["gradients"], [grads["replayed"]], [grads["eager"]])
    record.line(errors=errors, **found)
    must_agree(errors)
