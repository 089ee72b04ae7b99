"""What is said of files that decoders fail on."""

from __future__ import annotations

from dist_train.errors import DecodeError


def too_large(where: object) -> DecodeError:
    return DecodeError(
        "takes more memory to decode than it may",
        where=where,
        fix="Cut it into shorter clips, or prepare anew with a larger --clip-memory.",
    )
