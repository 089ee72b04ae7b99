"""The packed forms of DICOM's pixels that imagecodecs unpacks, as a plugin of pydicom's decoders.

pydicom itself unpacks RLE; with Pillow, JPEG of 8 bits and JPEG 2000.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import IO, Any

import imagecodecs
import numpy as np

from dist_train.data.raw.damage import check_held
from dist_train.errors import DecodeError

# PS3.6, table A-1.
_JPEG = "1.2.840.10008.1.2.4."
_DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {
    f"{_JPEG}50": imagecodecs.jpeg8_decode,
    f"{_JPEG}51": imagecodecs.jpeg8_decode,
    f"{_JPEG}57": imagecodecs.ljpeg_decode,
    f"{_JPEG}70": imagecodecs.ljpeg_decode,
    f"{_JPEG}80": imagecodecs.jpegls_decode,
    f"{_JPEG}81": imagecodecs.jpegls_decode,
    f"{_JPEG}90": imagecodecs.jpeg2k_decode,
    f"{_JPEG}91": imagecodecs.jpeg2k_decode,
}
# For pydicom: the packages that each form needs.
DECODER_DEPENDENCIES = dict.fromkeys(_DECODERS, ("imagecodecs",))


def is_available(uid: str) -> bool:
    """Whether a transfer syntax is unpacked here; pydicom asks."""
    return uid in _DECODERS


def decode(packed: bytes, runner: Any) -> bytes:
    """Unpack a frame for pydicom's ``DecodeRunner``."""
    array = np.asarray(_DECODERS[runner.transfer_syntax](packed))
    runner.set_option("bits_allocated", 8 * array.dtype.itemsize)
    if array.ndim == 3:
        runner.set_option("planar_configuration", 0)
        if str(runner.photometric_interpretation) in ("YBR_RCT", "YBR_ICT"):
            runner.set_option("photometric_interpretation", "RGB")
    return array.tobytes()


def check_packed_frames(file: IO[bytes], header: Any) -> None:
    """Raise DecodeError unless the file's packed pixels can be unpacked, and are all there.

    Args:
        file: at the element of its pixels.
        header: pydicom's, of this file.
    """
    from pydicom.encaps import parse_fragments
    from pydicom.pixels import get_decoder

    form = header.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(form)
    except NotImplementedError:
        raise DecodeError(f"is packed as {form.name}", fix="Unpack it first.") from None
    if is_available(form) and "imagecodecs" not in decoder.available_plugins:
        decoder.add_plugin("imagecodecs", (__name__, "decode"))
    if not decoder.is_available:
        raise DecodeError(
            f"is packed as {form.name}",
            fix=f"Install one of {', '.join(decoder.missing_dependencies)}, or unpack it first.",
        )
    # Tag, type and length of the element.
    file.seek(12, os.SEEK_CUR)
    count, starts = parse_fragments(file)
    frames = int(header.get("NumberOfFrames") or 1)
    # The first one has the places of the others.
    count = max(0, count - 1)
    if count < frames:
        raise DecodeError(f"is cut short: {frames} frames are declared, {count} are there")
    file.seek(starts[-1] + 4)
    length = int.from_bytes(file.read(4), "little")
    start = file.tell()
    check_held(length, file.seek(0, os.SEEK_END) - start)
