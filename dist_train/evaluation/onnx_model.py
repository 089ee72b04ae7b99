"""Models as an ONNX file."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from dist_train.errors import RunError
from dist_train.evaluation.exported import BINARY, Ensemble
from dist_train.targets import Target

NEEDED = ("onnx", "onnxscript")
#: Limit of a protobuf message, and so of an ONNX file that contains its weights.
MOST_BYTES = 2**31


def check_packages() -> None:
    """Raise ``RunError`` unless the packages that PyTorch's exporter needs are installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise RunError(
            f"ONNX needs {' and '.join(missing)}",
            fix="Run pip install 'dist_train[export]', or leave out --onnx.",
        )


def onnx_bytes(
    models: Sequence[nn.Module],
    shape: tuple[int, int, int],
    facts: Mapping[str, Any],
    target: Target = BINARY,
) -> bytes:
    """Content of an ONNX file with models in eval mode, whose scores are averaged.

    Args:
        shape: channels, height and width of the clips.
        facts: metadata, written as JSON.
        target: what the models predict.

    Raises:
        RunError: together the models are too large for one file.
    """
    # Deep enough that no axis has length 1 in any layer, which would be exported as a constant.
    depth = 1 + 2 * max(getattr(model, "frame_stride", 16) for model in models)
    channels, height, width = shape
    if sum(t.nbytes for model in models for t in model.state_dict().values()) >= MOST_BYTES:
        raise RunError(
            "the model is larger than the 2 GiB of an ONNX file",
            fix="Leave out --onnx, or take one snapshot of several by --step.",
        )
    example = torch.zeros(2, channels, depth, height, width), torch.full((2,), depth)
    # The exporter talks of its internals, and of packages that are not needed here.
    with _quiet("torch.onnx"), warnings.catch_warnings(action="ignore"), torch.no_grad():
        program = torch.onnx.export(
            Ensemble(models, target).eval(),
            example,
            input_names=["volumes", "frames"],
            output_names=["value" if target.kind == "regression" else "probability", "logits"],
            dynamic_shapes={"volumes": {0: "batch", 2: "depth"}, "frames": {0: "batch"}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert program is not None
    content = program.model_proto
    content.metadata_props.add(key="facts", value=json.dumps(dict(facts)))
    serialized: bytes = content.SerializeToString()
    return serialized


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Context in which a logger tells of errors only."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
