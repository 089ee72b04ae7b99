"""3D-ResNets of Hara, Kataoka & Satoh 2018, trained on Kinetics-400.

Frames had pixels of 0 to 255, less the mean of ActivityNet, and were not divided by a deviation.
Their files were saved in torch's DataParallel, so that each name begins with "module.".
"""

from torch import nn

from dist_train.models.layouts.hara import is_colour_resnet3d
from dist_train.models.resnet_transfer import move_resnet
from dist_train.models.transfer import Given, Normalised, Transfer

TITLE = "3D-ResNets of Hara et al. 2018"
MEAN = (114.7748, 107.7354, 99.4750)
PIXELS = Normalised([mean / 255 for mean in MEAN], [1 / 255] * 3)


def recognises(given: Given, model: nn.Module) -> bool:
    return is_colour_resnet3d(given) and given.is_parallel


def move(move: Transfer, given: Given) -> None:
    move_resnet(move, stem_stride=(1, 2, 2), stem_pool=True, normalised=PIXELS)
    move.take_head("fc")
    move.finish()
