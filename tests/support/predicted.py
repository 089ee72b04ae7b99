"""A rank's program: runs the command line, and records its use of model, store and disk.

    predicted.py NOTES predict RUN ...

Each rank writes ``NOTES/rank-R.json``: ``seen``, the clips of each batch that the model was given;
``read``, the numbers of the clips that were read; ``opened``, the files opened for writing.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from dist_train import cli
from dist_train.data.store.reader import Store
from dist_train.models.resnet3d import ResNet3D

notes: dict[str, list[Any]] = {"seen": [], "read": [], "opened": []}
place = Path(sys.argv.pop(1)) / f"rank-{os.environ.get('RANK', '0')}.json"
read_into = Store.read_into


def note_batch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    if isinstance(module, ResNet3D) and not inputs[0].is_meta:
        notes["seen"].append(len(inputs[0]))


def note_read(store: Store, out: Any, clip: int) -> None:
    notes["read"].append(int(clip))
    read_into(store, out, clip)


def note_opening(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str):
        path, _, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            notes["opened"].append(path)


def write_notes(code: int = 0) -> None:
    opened = list(notes["opened"])
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(notes | {"opened": opened}))


register_module_forward_pre_hook(note_batch)
Store.read_into = note_read
sys.addaudithook(note_opening)
leave = cli._leave_launch


def noted(code: int = 0) -> None:
    write_notes()
    leave(code)


cli._leave_launch = noted
cli.main()
