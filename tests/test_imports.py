"""The order of the house: imports go downward only, and some only in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from helpers import ROOT, environment

PACKAGE = ROOT / "dist_train"
# From the ground up; what stands together may import each other, without cycles.
LEVELS = [
    {"errors", "safe_text"},
    {"os_advice", "cgroup", "file_locks", "main_guard"},
    {"shared_memory", "plain_yaml"},
    {"config", "console", "quiet"},
    {"data"},
    {"models"},
    {"engine"},
    {"run_folder", "run_splits"},
    {"run", "infer", "state", "epoch_weights", "micro_batch", "outputs", "snapshots", "submission"},
    {"fresh_statistics", "prediction_origin", "exported"},
    {
        "batches",
        "judge",
        "ensemble",
        "initial_weights",
        "introduction",
        "seen_before",
        "small_sets",
    },
    {"train", "predict", "export", "evaluate", "report", "doctor"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
each_module = pytest.mark.parametrize(
    "path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE))
)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Full names of all that a module imports, wherever in it the import stands."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    """The part of the house that a module belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def own(names: Iterator[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("dist_train.")}


@each_module
def test_imports_go_downward(path: Path) -> None:
    for target in own(imported(path)):
        assert LEVEL[target] <= LEVEL[part(path)], f"{part(path)} imports {target}, which is above"


@each_module
def test_models_know_no_data(path: Path) -> None:
    if part(path) == "models":
        assert own(imported(path)) <= {"errors", "config", "models"}


@each_module
def test_the_launcher_libraries_are_behind_the_backend(path: Path) -> None:
    libraries = {name.split(".")[0] for name in imported(path)}
    if path.parent != PACKAGE / "engine" / "backends":
        assert not libraries & {"accelerate", "deepspeed"}
    assert not libraries & {"tests", "tools", "helpers"}


@each_module
def test_nothing_pickles_to_a_file(path: Path) -> None:
    libraries = {name.split(".")[0] for name in imported(path)}
    assert not libraries & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "save"), ("torch", "load")}
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False


def test_no_two_modules_import_each_other() -> None:
    modules = {name_of(path) for path in MODULES}
    arrows = {
        name_of(path): {
            name
            for target in imported(path)
            for name in (target, target.rpartition(".")[0])
            if name in modules
        }
        for path in MODULES
    }
    while arrows:
        free = {name for name, targets in arrows.items() if not targets & arrows.keys()}
        assert free, f"a cycle among {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in free}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_the_command_line_loads_no_heavy_library() -> None:
    """Help and usage errors answer at once, because each command imports what it needs itself."""
    heavy = "{'torch', 'numpy', 'pandas', 'accelerate', 'deepspeed', 'av', 'cv2', 'pydantic'}"
    code = f"import sys, dist_train.cli; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr


def test_training_and_prediction_load_no_decoder() -> None:
    """Each loader worker would hold FFmpeg and the codecs of TIFF, which a store has no use for."""
    modules = ["train", "predict", "export", "data.loader", "data.fetch"]
    imports = "; ".join(f"import dist_train.{module}" for module in modules)
    decoders = "{'av', 'tifffile', 'imagecodecs'}"
    code = f"import sys; {imports}; print(sorted({decoders} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
