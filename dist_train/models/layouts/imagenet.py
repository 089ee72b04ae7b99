"""2D ResNets trained on ImageNet, by torchvision's names, which timm has too: inflated to 3D.

Each kernel is repeated over depth and divided by the number of its frames (I3D, Carreira &
Zisserman 2017). For a clip of equal frames, a frame so far from both ends that no window reaches
the zeros there has the features of the 2D network.
"""

from torch import nn

from dist_train.models.frame_sequence import FrameSequence
from dist_train.models.resnet_transfer import is_resnet, move_resnet
from dist_train.models.transfer import Given, Normalised, Transfer

TITLE = "2D ResNets of torchvision and timm"
IMAGENET = Normalised((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def recognises(given: Given, model: nn.Module) -> bool:
    return is_resnet(given.tensors, 4) and not isinstance(model, FrameSequence)


def move(move: Transfer, given: Given) -> None:
    move_resnet(move, stem_stride=(None, 2, 2), stem_pool=True, normalised=IMAGENET)
    move.take_head("fc")
    move.finish()
