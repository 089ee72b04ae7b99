"""Copies of the config files and launch files that come with the package.

``configs`` and ``launch`` in the package's folder link to the folders of the repository; a wheel
holds the files themselves.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from dist_train.errors import ConfigError
from dist_train.files import write_whole

PACKAGE = Path(__file__).parent


def write_config(name: str, folder: Path) -> Path:
    """Copy the config file ``name`` to a folder, and return the path of the copy.

    Raises:
        ConfigError: there is no such config, or the file exists already.
    """
    names = sorted(path.stem for path in (PACKAGE / "configs").glob("*.yaml"))
    if name not in names:
        raise ConfigError(f"there is no config '{name}'", fix=f"The names are: {', '.join(names)}.")
    out = folder / f"{name}.yaml"
    _refuse_existing(out)
    write_whole(out, (PACKAGE / "configs" / out.name).read_bytes())
    return out


def write_launch_files(folder: Path) -> Path:
    """Copy the launch files to ``folder/launch``, and return that folder. The files refer to each
    other by paths relative to ``folder``.

    Raises:
        ConfigError: ``folder/launch`` exists already.
    """
    out = folder / "launch"
    _refuse_existing(out)
    folder.mkdir(parents=True, exist_ok=True)
    # A rename, so that the folder never appears incomplete.
    with TemporaryDirectory(dir=folder, prefix=".launch-") as aside:
        made = Path(aside, "launch")
        shutil.copytree(PACKAGE / "launch", made, ignore=shutil.ignore_patterns("__pycache__"))
        made.rename(out)
    return out


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise ConfigError("it exists already", where=path, fix="Remove it first.")
