"""Config files and launch files that come with the package, written to where a user works.

``configs`` and ``launch`` in the package's folder are links to the folders of the repository, whose
files a wheel holds in their place.
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
    """Write the config file ``name`` to a folder.

    Returns:
        The file that was written.

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
    """Write the launch files to ``folder/launch``: they name each other by paths that begin there.

    Returns:
        The folder with the files.

    Raises:
        ConfigError: ``folder/launch`` exists already.
    """
    out = folder / "launch"
    _refuse_existing(out)
    folder.mkdir(parents=True, exist_ok=True)
    # Made aside and renamed, so that the folder is never there in part.
    with TemporaryDirectory(dir=folder, prefix=".launch-") as aside:
        made = Path(aside, "launch")
        shutil.copytree(PACKAGE / "launch", made, ignore=shutil.ignore_patterns("__pycache__"))
        made.rename(out)
    return out


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise ConfigError("it exists already", where=path, fix="Remove it first.")
