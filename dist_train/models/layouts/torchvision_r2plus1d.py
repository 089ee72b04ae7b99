"""torchvision's r2plus1d_18 (Tran et al. 2018), trained on Kinetics-400."""

import re

from torch import nn

from dist_train.errors import ModelError
from dist_train.models.layouts.torchvision_video import KINETICS
from dist_train.models.transfer import Given, Transfer

TITLE = "r2plus1d_18 of torchvision"
STEM = "stem.0.conv.weight"
#: Names there, and here: each convolution is one in space, a normalisation, and one in depth.
NAMES = (
    (r"^stem\.0\.", "stem.0.conv."),
    (r"^stem\.1\.", "stem.0.norm."),
    (r"^stem\.3\.", "stem.1.conv."),
    (r"^stem\.4\.", "stem.1.norm."),
    (r"\.(conv\d)\.0\.0\.", r".\1.space.conv."),
    (r"\.(conv\d)\.0\.1\.", r".\1.space.norm."),
    (r"\.(conv\d)\.0\.3\.", r".\1.depth.conv."),
    (r"\.(conv\d)\.1\.", r".\1.depth.norm."),
    (r"\.downsample\.0\.", ".shortcut.conv."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


def recognises(given: Given, model: nn.Module) -> bool:
    return {"stem.3.weight", "layer1.0.conv1.0.3.weight"} <= given.tensors.keys()


def move(move: Transfer, given: Given) -> None:
    if STEM not in move.own or "blocks.0.conv1.space.conv.weight" not in move.own:
        raise ModelError(
            "the weights are of an R(2+1)D network, and the model is none",
            fix="Set model.name=r2plus1d-18.",
        )
    # The network of 18 layers has two blocks in each.
    move.rename(_our_name)
    kernel, border = move.normalised(move.tensor(STEM), KINETICS)
    move.notes.append("around the frames it saw the mean colour, and here is black")
    kernel, done = move.for_channels(kernel)
    move.take(STEM, STEM, "; ".join(["for pixels of 0 to 1", *done]), value=kernel)
    move.take_norm(
        "stem.0.norm", "stem.0.norm", shift=border.flatten(1).sum(1), why="for pixels of 0 to 1"
    )
    done_already = set(move.state)
    for name in move.given:
        if name not in done_already and not name.startswith("fc."):
            move.take(name, name)
    move.take_head("fc")
    move.finish()


def _our_name(name: str) -> str:
    for there, here in NAMES:
        name = re.sub(there, here, name)
    block = re.match(r"layer(\d)\.(\d)\.(.*)", name)
    return f"blocks.{2 * int(block[1]) - 2 + int(block[2])}.{block[3]}" if block else name
