"""MedicalNet: 3D ResNets trained to segment 23 sets of medical volumes (Chen, Ma & Zheng 2019)."""

from torch import nn

from dist_train.models.resnet_transfer import STEM, has_shortcut_bias, is_resnet, move_resnet
from dist_train.models.transfer import Given, Transfer

TITLE = "MedicalNet"


def recognises(given: Given, model: nn.Module) -> bool:
    return (
        is_resnet(given.tensors, 5)
        and given.tensors[STEM].shape[1:] == (1, 7, 7, 7)
        and not any(name.startswith("fc.") for name in given.tensors)
        and not has_shortcut_bias(given.tensors)
    )


def move(move: Transfer, given: Given) -> None:
    move_resnet(move, stem_stride=(2, 2, 2), stem_pool=True)
    move.notes += [
        "its layers 3 and 4 keep the size of layer 2 and are dilated by 2 and 4; here they halve "
        "the size, so the same kernels see another scale",
        "its volumes had mean 0 and deviation 1 over their bright part, which no weight can make "
        "up for: statistics of the first layers fit after some steps, so do not freeze them",
    ]
    move.leave([name for name in move.given if name.startswith("conv_seg.")], "it segments")
    move.finish()
