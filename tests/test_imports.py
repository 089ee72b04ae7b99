"""Imports go downward only, and some libraries are imported in one place only."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter

from helpers import ROOT, environment

PACKAGE = ROOT / "dist_train"
#: Rooms and modules, from the ground up. Those of one level may import each other, without cycles.
#: A name includes everything below it that is not named itself.
LEVELS = [
    {"errors", "safe_text"},
    {"system"},
    {"places"},
    {"files", "array_file", "objects", "plain_yaml", "extensions", "progress", "quiet", "shipped"},
    {"metrics", "class_ratio", "targets"},
    {"class_metrics"},
    {"config", "config_help"},
    {"models", "data.types", "data.orientation", "data.plan", "data.table"},
    {"data.raw", "data.augment"},
    {"data.store", "data.synthetic"},
    {
        "data.splits",
        "data.target_labels",
        "data.inspect",
        "data.duplicates",
        "data.loading",
        "data.pictures",
    },
    {"data.check"},
    {"distributed"},
    {"checkpoint"},
    {"run"},
    {"training", "evaluation", "doctor", "explain"},
    {"sweep"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
#: Rooms that must not import others, though their level allows it.
NEVER = {
    "models": {"config", "data", "distributed", "run"},
    "data.plan": {"files", "config", "data.types", "data.orientation", "data.table", "models"},
    "data.table": {"data.plan", "models"},
    "data.raw": {"data.plan", "data.augment", "models"},
    "data.store": {"data.plan", "data.augment", "models"},
    "data.augment": {"data.table", "data.raw", "data.plan", "models"},
    "data.loading": {"data.table", "data.raw", "models"},
    "data.check": {"data.raw", "data.augment", "data.plan", "data.loading", "models"},
    "data": {"models"},
    "distributed": {"data"},
    "checkpoint": {"data", "models"},
    "evaluation": {"doctor", "explain"},
    "training": {"evaluation", "doctor", "explain"},
    "doctor": {"training", "evaluation", "explain"},
    "explain": {"doctor"},
    "sweep": {"doctor"},
}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
#: Packages, from whose ``__init__`` names can be imported.
ROOMS = {".".join(path.relative_to(PACKAGE).parent.parts) for path in PACKAGE.rglob("__init__.py")}


@cache
def imported(module: str) -> frozenset[str]:
    """Full names of everything that a module imports, at any place in it."""
    found = set()
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def own(module: str) -> set[str]:
    """Modules of the package that a module imports."""
    names = [name.removeprefix("dist_train.") for name in imported(module) if "dist_train" in name]
    known = MODULES.keys() | ROOMS
    return {name if name in known else name.rpartition(".")[0] for name in names} - {""}


def level(module: str) -> int:
    while module not in LEVEL:
        module, dot, _ = module.rpartition(".")
        assert dot, f"{module} is on no level"
    return LEVEL[module]


def is_within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def test_imports_go_downward() -> None:
    upward = [
        f"{module} imports {target}"
        for module in MODULES
        for target in own(module)
        if level(target) > level(module)
    ]
    assert not upward


def test_rooms_that_must_not_know_each_other() -> None:
    known = [
        f"{module} imports {target}"
        for module in MODULES
        for room, strangers in NEVER.items()
        if is_within(module, room)
        for target in own(module)
        if any(is_within(target, stranger) for stranger in strangers)
    ]
    assert not known


def test_the_launcher_libraries_are_behind_the_backend() -> None:
    for module in MODULES:
        libraries = {name.split(".")[0] for name in imported(module)}
        if not module.startswith("distributed.backends"):
            assert not libraries & {"accelerate", "deepspeed"}, module
        assert not libraries & {"tests", "tools", "helpers"}, module


def test_nothing_pickles_to_a_file() -> None:
    for module, tree in MODULES.items():
        libraries = {name.split(".")[0] for name in imported(module)}
        pickles = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
        assert not libraries & pickles, module
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = (node.value.id, node.attr)
                assert called != ("torch", "save"), module
                assert called != ("torch", "load") or module == "training.weights_file", module
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, node.keywords), module
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant), module
                assert node.value.value is False, module


def test_no_two_modules_import_each_other() -> None:
    TopologicalSorter({module: own(module) - {module} for module in MODULES}).prepare()


def loaded(imports: str, libraries: set[str]) -> list[str]:
    """Which of the libraries a new process loads by an import statement."""
    code = f"import sys; {imports}; print(*sorted({libraries} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_command_line_loads_no_heavy_library() -> None:
    """Help and usage errors answer at once, because each command imports what it needs itself."""
    heavy = {"torch", "numpy", "pandas", "accelerate", "deepspeed", "av", "cv2", "pydantic"}
    assert loaded("import dist_train.cli", heavy) == []


def test_training_and_prediction_load_no_decoder() -> None:
    """Each loader worker would hold FFmpeg and the codecs of TIFF, which a store has no use for."""
    modules = ["training.train", "evaluation.predict", "evaluation.export", "data.loading.loader"]
    imports = ", ".join(f"dist_train.{module}" for module in modules)
    assert loaded(f"import {imports}", {"av", "tifffile", "imagecodecs"}) == []
