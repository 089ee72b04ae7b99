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
#: Rooms and modules, from the ground up. What stands on one level may import each other, without
#: cycles; a name stands for all that is below it and not named itself.
LEVELS = [
    {"errors", "safe_text"},
    {"system"},
    {"files", "plain_yaml", "extensions", "progress", "quiet", "shipped"},
    {"metrics", "class_ratio"},
    {"config", "config_help"},
    {"models", "data.types", "data.orientation", "data.plan", "data.table"},
    {"data.raw", "data.augment"},
    {"data.store", "data.synthetic"},
    {"data.splits", "data.inspect", "data.duplicates", "data.loading"},
    {"distributed"},
    {"checkpoint"},
    {"run"},
    {"training", "evaluation", "doctor"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
#: Rooms that must not know of others, though their level allows it.
NEVER = {
    "models": {"config", "data", "distributed", "run"},
    "data.plan": {"files", "config", "data.types", "data.orientation", "data.table", "models"},
    "data.table": {"data.plan", "models"},
    "data.raw": {"data.plan", "data.augment", "models"},
    "data.store": {"data.plan", "data.augment", "models"},
    "data.augment": {"data.table", "data.raw", "data.plan", "models"},
    "data.loading": {"data.table", "data.raw", "models"},
    "data": {"models"},
    "distributed": {"data"},
    "checkpoint": {"data", "models"},
    "evaluation": {"doctor"},
    "training": {"evaluation", "doctor"},
    "doctor": {"training", "evaluation"},
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
#: Packages, whose ``__init__`` can be imported from.
ROOMS = {".".join(path.relative_to(ROOT).parent.parts) for path in PACKAGE.rglob("__init__.py")}
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


def place(module: str) -> str:
    """The name in ``LEVEL`` that a module is counted under: "data.plan" for "data.plan.shuffle"."""
    while module not in LEVEL:
        module, dot, _ = module.rpartition(".")
        assert dot, f"{module} is on no level"
    return module


def own(path: Path) -> set[str]:
    """Modules of the package that a module imports."""
    names = {name_of(path) for path in MODULES} | ROOMS
    found = set()
    for target in imported(path):
        if target.startswith("dist_train."):
            module = target if target in names else target.rpartition(".")[0]
            found.add(module.removeprefix("dist_train."))
    return found - {"dist_train", ""}


def is_within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


@each_module
def test_imports_go_downward(path: Path) -> None:
    module = name_of(path).removeprefix("dist_train.")
    for target in own(path):
        assert LEVEL[place(target)] <= LEVEL[place(module)], f"{module} imports {target}, above it"


@each_module
def test_rooms_that_must_not_know_each_other(path: Path) -> None:
    module = name_of(path).removeprefix("dist_train.")
    for room, strangers in NEVER.items():
        if is_within(module, room):
            for target in own(path):
                known = [stranger for stranger in strangers if is_within(target, stranger)]
                assert not known, f"{module} imports {target}"


@each_module
def test_the_launcher_libraries_are_behind_the_backend(path: Path) -> None:
    libraries = {name.split(".")[0] for name in imported(path)}
    if path.parent != PACKAGE / "distributed" / "backends":
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
    modules = ["training.train", "evaluation.predict", "evaluation.export", "data.loading.loader"]
    imports = "; ".join(f"import dist_train.{module}" for module in modules)
    decoders = "{'av', 'tifffile', 'imagecodecs'}"
    code = f"import sys; {imports}; print(sorted({decoders} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
