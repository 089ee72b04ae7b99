"""The network's normalisations are all counted, and both ways are timed."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch
from bench_norm import WAYS, Layer, as_table, layers_of, measure


def test_all_normalisations_are_counted() -> None:
    layers = layers_of("resnet3d-50", 2, 16, 64)
    assert sum(layers.values()) == 1 + 3 * 16 + 4
    # The blocks' last ones, their shortcuts, and the rest.
    assert sum(count for layer, count in layers.items() if layer.plus) == 16
    assert sum(count for layer, count in layers.items() if not layer.relu) == 4
    assert layers[Layer(64, 16, 32, 32, plus=False, relu=True)] == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
def test_both_ways_are_timed() -> None:
    layers = Counter({Layer(8, 4, 6, 6, False, True): 3, Layer(8, 4, 6, 6, True, True): 2})
    result = measure(layers, 2, torch.device("cpu"), torch.float32, rounds=1)
    lines = result["layers"]
    assert [line["count"] for line in lines] == [3, 2]
    for way in WAYS:
        assert all(line[way] > 0 for line in lines)
        total = sum(line["count"] * line[way] for line in lines)
        assert result["summary"][way] == pytest.approx(total)
    assert as_table(result, "two layers").row_count == 3
