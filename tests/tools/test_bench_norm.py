"""The network's normalisations are all counted, and both ways are timed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from bench_norm import Layer, layers_of
from helpers import ROOT, run_well


def test_all_normalisations_are_counted() -> None:
    layers = layers_of("resnet3d-50", 2, 16, 64)
    assert sum(layers.values()) == 1 + 3 * 16 + 4
    # The blocks' last ones, their shortcuts, and the rest.
    assert sum(count for layer, count in layers.items() if layer.plus) == 16
    assert sum(count for layer, count in layers.items() if not layer.relu) == 4
    assert layers[Layer(64, 16, 32, 32, plus=False, relu=True)] == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
def test_both_ways_are_timed(tmp_path: Path) -> None:
    out = tmp_path / "norm.json"
    size = ["--model", "resnet3d-10", "--frames", "4", "--side", "32", "--quick"]
    run_well([sys.executable, str(ROOT / "tools" / "bench_norm.py"), *size, "--json", str(out)])
    result = json.loads(out.read_text())
    lines = result["layers"]
    assert sum(line["count"] for line in lines) == 1 + 2 * 4 + 3
    for way in ("plain_ms", "fused_ms"):
        assert all(line[way] > 0 for line in lines)
        total = sum(line["count"] * line[way] for line in lines)
        assert result["summary"][way] == pytest.approx(total)
