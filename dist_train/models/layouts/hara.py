"""3D-ResNets of Hara, Kataoka & Satoh, files of 2020: Kinetics-700, Moments in Time and others.

Frames were scaled to 0 to 1, and normalised by mean and standard deviation of Kinetics.
"""

from torch import nn

from dist_train.models.resnet_transfer import STEM, has_shortcut_bias, is_resnet, move_resnet
from dist_train.models.transfer import Given, Normalised, Transfer

TITLE = "3D-ResNets of Hara et al. 2020"
KINETICS = Normalised((0.4345, 0.4051, 0.3775), (0.2768, 0.2713, 0.2737))


def recognises(given: Given, model: nn.Module) -> bool:
    return is_colour_resnet3d(given) and not given.is_parallel


def is_colour_resnet3d(given: Given) -> bool:
    """Whether these are kernels over frames in colour, of a network of Hara et al."""
    return (
        is_resnet(given.tensors, 5)
        and given.tensors[STEM].shape[1:] == (3, 7, 7, 7)
        and not has_shortcut_bias(given.tensors)
    )


def move(move: Transfer, given: Given) -> None:
    move_resnet(move, stem_stride=(1, 2, 2), stem_pool=True, normalised=KINETICS)
    move.take_head("fc")
    move.finish()
