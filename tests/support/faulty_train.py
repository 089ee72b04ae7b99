"""``dist-train train`` with faults: FAULTS names a JSON file of them, made by the test.

Started as a program, by a real launcher or by ``warm.py``.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

from faults import Injector, from_json

import dist_train.training.train
from dist_train import cli


def main() -> None:
    """Run the command line of ``sys.argv``; return after success, else end as the command does."""
    sys.argv.insert(1, "train")
    place = os.environ.get("FAULTS")
    if place is not None:
        faults = [from_json(content) for content in json.loads(Path(place).read_text())]
        injector = Injector(faults, Path(place).parent)
        dist_train.training.train.train = partial(
            dist_train.training.train.train, before_step=injector
        )
    try:
        cli.main()
    except SystemExit as ended:
        if ended.code:
            raise


if __name__ == "__main__":
    main()
