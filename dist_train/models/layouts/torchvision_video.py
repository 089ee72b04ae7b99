"""torchvision's r3d_18 and mc3_18 (Tran et al. 2018), trained on Kinetics-400.

Their stem is three frames deep, and no max pooling follows it.
"""

import re

from torch import nn

from dist_train.models.resnet_transfer import move_resnet
from dist_train.models.transfer import Given, Normalised, Transfer

TITLE = "r3d_18 and mc3_18 of torchvision"
KINETICS = Normalised((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))


def recognises(given: Given, model: nn.Module) -> bool:
    return {"stem.0.weight", "layer1.0.conv1.0.weight"} <= given.tensors.keys()


def move(move: Transfer, given: Given) -> None:
    move.rename(_usual_name)
    if move.tensor("layer2.0.conv1.weight").shape[2] == 1:
        move.notes.append(
            "it is mc3_18, whose layers 2 to 4 see one frame at a time and keep their number; here "
            "they halve it, and may learn to see three"
        )
    move_resnet(move, stem_stride=(1, 2, 2), stem_pool=False, normalised=KINETICS)
    move.take_head("fc")
    move.finish()


def _usual_name(name: str) -> str:
    """The name that the same tensor has in torchvision's 2D ResNets."""
    for there, here in (
        (r"^stem\.0\.", "conv1."),
        (r"^stem\.1\.", "bn1."),
        (r"\.conv(\d)\.0\.", r".conv\1."),
        (r"\.conv(\d)\.1\.", r".bn\1."),
    ):
        name = re.sub(there, here, name)
    return name
