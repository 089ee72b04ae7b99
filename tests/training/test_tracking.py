"""MLflow and W&B get each step once, with the settings, and their failure costs nothing."""

from __future__ import annotations

import json
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import STEPS_PER_EPOCH, metrics_of, overrides, refused, tiny_config
from short_runs import train_until

from dist_train.config import load_config
from dist_train.run.record import open_run
from dist_train.training import tracking
from dist_train.training.tracking import Tracking
from dist_train.training.train import train

mlflow = pytest.importorskip("mlflow")
#: Two sessions: the first is ended at step 5, and saved at step 4.
MORE = ("train.epochs=1", "snapshots.at=[1]", "track=[mlflow]")
LEFT_AT = 5


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "PAUSE", 0.01)


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new database of MLflow, which is used by default."""
    place = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
    return place


@pytest.mark.slow
def test_two_sessions_are_one_run_of_mlflow(
    store: Path, tmp_path: Path, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    config = tiny_config(store, out, *MORE)
    train_until(config, LEFT_AT)
    train(config, resume="auto")
    assert "metrics.jsonl has all" not in caplog.text
    assert not (out / "tensorboard").exists()
    client = mlflow.MlflowClient(database)
    (experiment,) = client.search_experiments(filter_string="name = 'dist_train'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == str(config.optim.lr)
    for name, there in (("train/loss", "train/loss"), ("val/mcc@0.5", "val/mcc_0.5")):
        sent = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, there)]
        lines = [(line["step"], line[name]) for line in metrics_of(out) if name in line]
        assert sorted(sent) == lines
        assert lines[-1][0] == STEPS_PER_EPOCH
    # What shows a run says nothing about its results.
    shown = load_config(out / "config.yaml", ["track=[jsonl]"])
    (out / "config.yaml").write_text((out / "config.yaml").read_text().replace("mlflow", "jsonl"))
    assert open_run(out) == shown


@pytest.mark.slow
def test_offline_wandb_gets_each_step_once(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(tracking, "LAST_WAIT", 120.0)
    standard, out = sys.stdout, tmp_path / "run"
    config = tiny_config(store, out, *MORE, "track=[wandb]")
    train_until(config, LEFT_AT)
    train(config, resume="auto")
    assert "metrics.jsonl has all" not in caplog.text
    assert sys.stdout is standard
    sent, settings, ids = [], set(), set()
    for path in sorted((out / "wandb").glob("offline-run-*/run-*.wandb")):
        ids.add(path.stem)
        for record in records_of(path):
            items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            if "train/loss" in items:
                sent.append((int(items["_step"]), float(items["train/loss"])))
            for update in (*record.config.update, *record.run.config.update):
                if update.key == "optim.lr":
                    settings.add(update.value_json)
    assert sorted(sent) == [(line["step"], line["train/loss"]) for line in metrics_of(out)]
    assert ids == {f"run-{json.loads((out / 'wandb.json').read_text())['id']}"}
    assert settings == {str(config.optim.lr)}


def records_of(path: Path) -> Iterator[Any]:
    """The records of a file of W&B, which is a log of LevelDB: after 7 bytes come blocks of 32 KiB,
    of chunks with a checksum, a length and a type; this reads chunks that are whole records."""
    from wandb.proto import wandb_internal_pb2

    content, place = path.read_bytes(), 7
    while place + 7 <= len(content):
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if kind == 1:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content[place + 7 : place + 7 + length])
            yield record
        assert kind in (1, 2, 3, 4), "of no chunk"
        place += 7 + length
        if -place % 2**15 < 7:
            place += -place % 2**15


def test_a_server_that_is_gone_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "LAST_WAIT", 120.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", gone)
        tracked = Tracking(["mlflow"], tmp_path, {})
        for step in range(1, 100):
            tracked.write(step, {"a": 1.0})
        tracked.close()
        tracked.write(100, {"a": 1.0})
        tracked.close()
    (warning,) = [line for line in caplog.messages if "metrics.jsonl has all" in line]
    assert "mlflow: it gets nothing more of this session" in warning
    assert "Connection refused" in warning
    assert not (tmp_path / "mlflow.json").exists()


def test_a_server_that_does_not_answer_delays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """More steps than wait for it are left out, and the end of the session does not wait long."""
    monkeypatch.setattr(tracking, "LAST_WAIT", 0.1)
    monkeypatch.setattr(tracking, "MOST_WAITING", 10)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", place)
        tracked = Tracking(["mlflow"], tmp_path, {})
        for step in range(1, 100):
            tracked.write(step, {"a": 1.0})
        tracked.close()
        (warning,) = caplog.messages
        assert "mlflow: it is too slow: steps are left out" in warning
        connection, _ = silent.accept()
        connection.close()
    (service,) = tracked._services
    service._thread.join(60)
    assert len(caplog.messages) == 1


def test_a_package_that_is_missing_is_told_before_the_first_step(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_train.distributed.backends.trackers.find_spec", lambda name: None)
    told = refused("train", *overrides(store, tmp_path / "run", "track=[jsonl, wandb]"))
    assert told == (
        "error: track: wandb is not installed. Run 'pip install wandb', or leave it out of track."
    )
    assert not (tmp_path / "run").exists()
