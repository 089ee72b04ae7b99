"""What train prints: at its beginning, once it knows its speed, and at its end."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import overrides, said, tiny_config

from dist_train.run.record import read_record
from dist_train.training.console import MEASURED, Speed, closing, duration


def test_train_says_what_it_does_and_what_comes_next(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    lines = said("train", *overrides(store, out, "train.epochs=4")).splitlines()
    assert lines[:4] == [
        f"resnet3d-10, {read_record(out)['parameters']:,} parameters, on 1 x cpu, ddp, fp32",
        "clips: train 12 positive, 28 negative; val 4 positive, 6 negative; "
        "test 4 positive, 6 negative",
        # Of 8 clips 2 are positive; 12 positives an epoch.
        "4 epochs of 6 steps of 8 clips: 192 visits in all, 4 to each of the positives",
        f"run: {out}",
    ]
    (speed,) = [line for line in lines if " clips/s in steps 5 to 20: " in line]
    assert "at that rate 192 visits take " in speed
    assert lines[-1] == (
        f"next: dist-train predict {out} && dist-train evaluate {out} && dist-train report {out}"
    )


def test_a_run_on_all_clips_is_exported_next(store: Path) -> None:
    config = tiny_config(store, Path("my run"), "split.train_on_all=true")
    assert closing(config) == "next: dist-train export 'my run' --out 'my run.safetensors'"


def test_the_speed_is_told_once() -> None:
    speed = Speed(1000)
    lines = [speed.after_step(4) for _ in range(3 * MEASURED)]
    assert [number for number, line in enumerate(lines, 1) if line is not None] == [MEASURED]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 seconds"), (90, "1.5 minutes"), (9_000, "2.5 hours"), (1e8, "1,157.4 days")],
)
def test_durations_are_in_their_largest_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
