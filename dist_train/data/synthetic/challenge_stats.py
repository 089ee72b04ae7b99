"""What the clips of the Clog Loss challenge look like, as numbers.

Source: the published tables of the challenge (DrivenData, "Clog Loss: Advance Alzheimer's Research
with Stall Catchers", 2020), counted over its 573,048 training clips.
"""

from typing import Final

# Number of training clips with 17, 18, ... 434 frames (mean 59.5).
# fmt: off
_COUNTS: Final = (
    1, 1, 3, 11, 0, 0, 126, 813, 2011, 2875, 2873, 3310, 2847, 3383, 2987, 3300, 2932, 3419, 3153,
    3518, 3136, 3711, 3265, 3985, 3671, 4183, 3685, 4311, 3825, 9854, 22905, 26372, 24295, 25288,
    22708, 22665, 20395, 20192, 18271, 18614, 16732, 16240, 14825, 14360, 12969, 12623, 11424,
    11157, 10448, 9799, 8768, 8353, 7542, 7201, 6508, 6095, 5429, 5419, 4840, 4647, 4036, 4028,
    3649, 3511, 3117, 3071, 2679, 2756, 2448, 2512, 2266, 2061, 1926, 1851, 1636, 1622, 1506, 1652,
    1413, 1320, 1239, 1151, 1107, 1095, 952, 1009, 827, 799, 827, 826, 794, 715, 691, 663, 610, 607,
    563, 524, 484, 450, 470, 421, 370, 382, 356, 359, 320, 323, 300, 247, 287, 260, 218, 270, 222,
    235, 203, 195, 183, 195, 178, 166, 157, 151, 152, 128, 123, 129, 114, 130, 100, 89, 93, 105, 94,
    108, 71, 70, 80, 82, 63, 62, 64, 56, 50, 62, 49, 52, 44, 46, 50, 44, 50, 43, 36, 44, 32, 39, 25,
    26, 26, 23, 29, 22, 16, 32, 17, 21, 20, 16, 19, 16, 16, 12, 22, 17, 15, 6, 11, 11, 14, 19, 7, 6,
    11, 17, 13, 4, 10, 6, 13, 8, 9, 9, 9, 8, 15, 3, 6, 4, 3, 7, 1, 7, 10, 2, 3, 5, 1, 1, 1, 5, 3, 5,
    4, 1, 2, 2, 4, 2, 4, 4, 0, 3, 3, 2, 1, 2, 2, 2, 2, 1, 4, 3, 0, 3, 2, 1, 1, 2, 1, 3, 2, 3, 1, 3,
    1, 0, 0, 2, 1, 2, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0,
    0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1,
)
# fmt: on

#: Number of training clips by number of frames.
CLIPS_BY_DEPTH: Final[dict[int, int]] = {n: count for n, count in enumerate(_COUNTS, 17) if count}

#: Share of the training clips that are tier 1, the tier of the surest labels.
TIER1_SHARE: Final = 540_242 / 573_048

#: (height, width) of the frames in pixels: nearly all have the first size.
FRAME_SIZES: Final = ((384, 512), (384, 418))

#: (smallest, mean, largest) side of the box around the outline, in pixels.
BOX_HEIGHT: Final = (22, 67, 335)
BOX_WIDTH: Final = (23, 68, 448)

#: (red, green, blue) of the outline after compression, and its width.
OUTLINE_COLOUR: Final = (224, 107, 34)
OUTLINE_WIDTH: Final = 3
