"""The trace holds the parts of a step, and the table its kernels."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, environment
from profile_step import host_calls, top_kernels
from torch._C._autograd import DeviceType


def event(key: str, count: int, device: DeviceType, microseconds: float) -> SimpleNamespace:
    return SimpleNamespace(
        key=key,
        count=count,
        device_type=device,
        self_device_time_total=microseconds,
        self_cpu_time_total=microseconds,
    )


#: What the profiler gives for two steps on CUDA: an operation has the time of its kernel too.
EVENTS = [
    event("aten::convolution", 4, DeviceType.CPU, 6000),
    event("implicit_gemm", 4, DeviceType.CUDA, 6000),
    event("elementwise", 2, DeviceType.CUDA, 2000),
    event("forward", 2, DeviceType.CUDA, 9000),
    event("cudaLaunchKernel", 10, DeviceType.CPU, 1),
    event("cuLaunchKernelEx", 6, DeviceType.CPU, 1),
    event("cudaGraphLaunch", 2, DeviceType.CPU, 1),
    event("cudaStreamSynchronize", 4, DeviceType.CPU, 1),
    event("cudaMemcpyAsync", 4, DeviceType.CPU, 1),
    event("cudaDeviceSynchronize", 3, DeviceType.CPU, 1),
]


def test_kernels_alone_share_the_time_of_a_device() -> None:
    assert top_kernels(EVENTS, cuda=True, steps=2) == [
        ("implicit_gemm", 2, 3.0, 0.75),
        ("elementwise", 1, 1.0, 0.25),
    ]


def test_launches_and_waits_of_a_step_are_counted() -> None:
    assert host_calls(EVENTS, steps=2) == {"launches": 9.0, "waits": 2.0}


@pytest.mark.slow
def test_one_command_leaves_a_trace_and_prints_the_top_kernels(tmp_path: Path) -> None:
    settings = ["model.name=resnet3d-10", "model.width=4", "train.precision=fp32"]
    command = [sys.executable, "tools/profile_step.py", *settings, "--clips", "2"]
    done = subprocess.run(
        [*command, "--frames", "8", "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "convolution_backward" in done.stdout
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events if event.get("ph") == "X"]
    for part in ("forward", "backward", "optimizer"):
        assert names.count(part) == 2
