"""docs/python.md: its script runs as it stands, and its table names what is there."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from inspect import isfunction, signature
from pathlib import Path
from typing import get_type_hints

import pytest
from helpers import ROOT, environment

from dist_train.progress import Progress

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")

NAMES = sorted(set(re.findall(r"\bdist_train(?:\.\w+)+", PAGE.partition("```python")[0])))
FUNCTIONS = {
    name: getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2], None)
    for name in NAMES
}


def test_every_name_on_the_page_is_there() -> None:
    assert len(FUNCTIONS) >= 10
    for name, function in FUNCTIONS.items():
        assert callable(function), name


def test_all_of_them_tell_their_progress_alike() -> None:
    telling = {}
    for function in FUNCTIONS.values():
        if isfunction(function) and "progress" in signature(function).parameters:
            telling[function.__name__] = get_type_hints(function)["progress"]
    names = ["synthesize", "prepare", "train", "predict", "explain"]
    assert telling == dict.fromkeys(names, Progress | None)


@pytest.mark.slow
def test_the_script_runs_as_it_stands(tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "script.py"],
        env=environment(PYTHONPATH=str(ROOT)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert any(line.startswith("40 clips; the first has the shape (") for line in said)
    assert any(re.fullmatch(r"AUC [01]\.\d+", line) for line in said)
    assert "report in run/report.html" in said
    assert (tmp_path / "model.safetensors").is_file()
    assert said[-1].startswith("refused: run: the folder holds a run already")
