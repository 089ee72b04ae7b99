"""ResNets of MONAI (monai.networks.nets.resnet), with any number of channels and any shortcut."""

from torch import nn

from dist_train.models.resnet_transfer import STEM, has_shortcut_bias, is_resnet, move_resnet
from dist_train.models.transfer import Given, Transfer

TITLE = "ResNets of MONAI"


def recognises(given: Given, model: nn.Module) -> bool:
    """By what those of Hara and MedicalNet have not: a bias of shortcuts, another stem, or a head
    behind a grey stem."""
    if not is_resnet(given.tensors, 5):
        return False
    stem = given.tensors[STEM].shape[1:]
    has_head = any(name.startswith("fc.") for name in given.tensors)
    return (
        has_shortcut_bias(given.tensors)
        or stem not in {(1, 7, 7, 7), (3, 7, 7, 7)}
        or (stem[0] == 1 and has_head)
    )


def move(move: Transfer, given: Given) -> None:
    move_resnet(move, stem_stride=(None, None, None), stem_pool=None)
    move.take_head("fc")
    move.finish()
