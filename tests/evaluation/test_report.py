import base64
import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from dist_train.data.check.result import CheckResult, Finding, Leak, Shift
from dist_train.errors import RunError
from dist_train.evaluation.calibration import fit
from dist_train.evaluation.evaluate import evaluate
from dist_train.evaluation.prediction_table import COLUMNS, read_predictions
from dist_train.evaluation.report import write_report
from dist_train.evaluation.report_charts import precision_recall
from dist_train.evaluation.report_mistakes import worst_mistakes
from dist_train.evaluation.report_run import read_run
from dist_train.metrics import prior_correct
from dist_train.run.record import _write_record, read_record

EPOCHS, STEPS_AN_EPOCH = 8, 40
RESUMED = 130
HOSTILE = '"><script>alert(1)</script>.mp4'
SECTIONS = [
    "results", "curves", "judgement", "mistakes", "data", "speed", "settings", "provenance",
]  # fmt: skip


class Page(HTMLParser):
    """Collects what the tests look at, and checks that tags nest."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def images(self, kind: str) -> list[bytes]:
        sources = [str(image["src"]).partition(",") for image in self.all("img")]
        kinds = f"data:image/{kind};base64"
        return [base64.b64decode(content) for head, _, content in sources if head == kinds]


def write_training(run: Path) -> None:
    """The files that training leaves: 320 steps, 8 epochs, resumed once, on a CPU."""
    generator = np.random.default_rng(0)
    with (run / "metrics.jsonl").open("w") as file:
        clock = 1.76e9
        for step in range(1, EPOCHS * STEPS_AN_EPOCH + 1):
            clock += 3600 if step == RESUMED + 1 else 2 + 0.2 * generator.random()
            done = step / (EPOCHS * STEPS_AN_EPOCH)
            record: dict[str, Any] = {
                "step": step,
                "epoch": (step - 1) // STEPS_AN_EPOCH,
                "time": clock,
                "train/loss": 0.6 * np.exp(-2 * done) + 0.05 + 0.06 * generator.random(),
                "train/lr": 0.01 * (1 - done),
                "train/grad_norm": 1 + generator.random(),
                "speed/clips_per_second": 40 + 4 * generator.random(),
                "speed/data_wait": 0.02 + 0.02 * generator.random(),
                "memory/host_mb": 2100 + 50 * generator.random(),
            }
            if step % STEPS_AN_EPOCH == 0:
                record["norm/gap"] = 0.02 * generator.random()
                record["val/loss"] = 0.5 * np.exp(-1.5 * done) + 0.14
                for split, lag in (("train", 1.0), ("val", 0.8)):
                    for index, threshold in enumerate((0.4, 0.5, 0.6, 0.7)):
                        level = lag * (1 - np.exp(-3 * done)) - 0.04 * index
                        record[f"{split}/mcc@{threshold}"] = level
                    record[f"{split}/accuracy"] = 0.75 + 0.2 * lag * done
                    first = step == STEPS_AN_EPOCH
                    record[f"{split}/auc"] = None if first else 0.6 + 0.35 * lag * done
                    record[f"{split}/ap"] = None if first else 0.4 + 0.5 * lag * done
            file.write(json.dumps(record) + "\n")
    (run / "config.yaml").write_text("model:\n  name: resnet3d\n  depth: 18\nseed: 7\n")
    info: dict[str, Any] = {
        "model": "ResNet-18 in 3D",
        "parameters": 33_160_000,
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "host": {"cpu": "2 cores", "memory_gb": 16},
        "positive_rate": {"train_batches": 0.25, "natural": 0.04},
        "settings": {"split": {"train_on_all": False}},
        "sessions": [
            {"started": "2026-01-05T09:00:00", "resumed_from_step": None, "world_size": 2},
            {"started": "2026-01-05T10:05:00", "resumed_from_step": RESUMED, "world_size": 1},
        ],
    }
    _write_record(run, info)


def write_predictions(run: Path, splits: tuple[str, ...] = ("val", "test")) -> None:
    """60 clips a split, a quarter positive, and a filename that is an attack."""
    generator = np.random.default_rng(1)
    with (run / "predictions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for split in splits:
            for index in range(60):
                label = int(index % 4 == 0)
                probability = 1 / (1 + np.exp(-generator.normal(2.4 * label - 1.6, 1.3)))
                name = f"{split}{index:03}"
                filename = HOSTILE if index == 1 else f"{name}.mp4"
                probability = 0.99 if index == 1 else probability
                corrected = prior_correct([probability], 0.25, 0.04)[0]
                table.writerow([name, filename, "g", split, label, probability, corrected, 40])


def strips(key: str) -> NDArray[np.uint8]:
    """A bright disc that walks across a dark field."""
    depth, height, width = 40, 60, 90
    frames = np.zeros((depth, height, width), dtype=np.uint8)
    for index, frame in enumerate(frames):
        cv2.circle(frame, (10 + 2 * index, 30), 8, 220, -1)
    return frames


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A run that is trained and not yet used to predict."""
    run = tmp_path / "run"
    run.mkdir()
    write_training(run)
    return run


@pytest.fixture
def finished(training: Path) -> Path:
    """A run that is predicted as well."""
    write_predictions(training)
    return training


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report; not to be changed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run.mkdir()
    write_training(run)
    write_predictions(run)
    assert write_report(run, clips=strips) == run / "report.html"
    return run


@pytest.fixture(scope="module")
def page(whole: Path) -> Page:
    return Page(whole / "report.html")


def test_page_of_a_finished_run(whole: Path, page: Page) -> None:
    assert [section["id"] for section in page.all("section")] == SECTIONS
    assert {link["href"] for link in page.all("a")} == {f"#{section}" for section in SECTIONS}
    evaluation = evaluate(whole / "predictions.csv")
    for text in (
        "95 % CI",
        f"{evaluation.mcc:.3f}",
        "fitted on val",
        "resumed 1 time",
        "ResNet-18 in 3D · 33.2 M parameters · 320 steps · 8 epochs",
        "depth: 18",
        "2026-01-05T10:05:00",
        "2.13.0",
    ):
        assert text in page.text
    assert "Optimistic" not in page.text
    assert "Statistics do not fit" not in page.text
    # 318 gaps of 2.0 to 2.2 s. The pause of an hour is not training.
    assert re.search(r"Time training 0:1[01]:", page.text)
    svgs = page.images("svg+xml")
    assert len(svgs) == 13
    assert sum(b"resumed" in svg for svg in svgs) == 9
    assert all(b"prefers-color-scheme:dark" in svg and b"var(--ink)" in svg for svg in svgs)


def test_page_shows_the_check_of_its_store(training: Path, caplog: Any) -> None:
    assert "The store was not checked" in Page(write_report(training)).text
    finding = Finding(kind="torn", clips=3, names=[HOSTILE])
    leak = Leak(
        columns=["width"], mcc=0.16, low=0.12, high=0.2, clips=900, apart=True, is_leak=True
    )
    shift = Shift(
        of="group", name="P03", statistic="mean grey", clips=40, value=90, others=70, difference=1.5
    )
    result = CheckResult(
        content="abc",
        clips=900,
        sampled=900,
        findings=[finding],
        shifts=[shift],
        leaks=[leak],
        notes=["leaks: a note"],
    )
    (training / "check.json").write_text(result.model_dump_json())
    _write_record(training, read_record(training) | {"store": {"content": "abc"}})
    text = Page(write_report(training)).text
    for expected in (
        "in the 900 clips of the store",
        f"torn 3 {HOSTILE}",
        "width 0.160 0.120 to 0.200 groups apart yes",
        "mean grey of group P03 40 90.0 70.0 +1.50 SD",
        "leaks: a note",
    ):
        assert expected in text
    # A check of another store is not shown, and one that is none is refused.
    (training / "check.json").write_text(
        result.model_copy(update={"content": "x"}).model_dump_json()
    )
    assert "The store was not checked" in Page(write_report(training)).text
    assert "of another store" in caplog.text
    (training / "check.json").write_text("{}")
    with pytest.raises(RunError, match=r"check\.json: is not the result of a check"):
        write_report(training)


def test_page_needs_nothing_but_itself(page: Page) -> None:
    assert page.all("script") == page.all("link") == []
    assert all(str(image["src"]).startswith("data:image/") for image in page.all("img"))
    assert all(image["alt"] for image in page.all("img"))
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert not re.match(r"(https?:)?//", attributes.get(name) or "")
    for svg in page.images("svg+xml"):
        assert not re.search(rb'(href|src)="(?!#)', svg)


def test_names_from_files_are_escaped(whole: Path, page: Page) -> None:
    assert "<script" not in (whole / "report.html").read_text()
    assert HOSTILE in page.text


def test_same_run_gives_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    second = write_report(whole, clips=strips, out=tmp_path / "new" / "again.html")
    assert second.read_bytes() == (whole / "report.html").read_bytes()


def test_strips_show_eight_frames_of_the_worst_mistakes(whole: Path, page: Page) -> None:
    run = read_run(whole)
    assert run.predictions is not None
    assert run.evaluation is not None
    asked: list[str] = []

    def reader(key: str) -> NDArray[np.uint8]:
        asked.append(key)
        return strips(key)

    mistakes = worst_mistakes(run, reader)
    (_, fp), (fn, _) = run.evaluation.confusion
    assert [len(clips) for clips in mistakes.values()] == [min(fp, 4), min(fn, 4)]
    assert asked[0] == "test001"  # the one that the fixture makes the worst
    clips = run.predictions.set_index("key")
    wrong = (clips["calibrated"] > run.evaluation.threshold) != (clips["label"] == 1)
    assert wrong[asked].all()
    images = page.images("png")
    assert len(images) == len(asked)
    image = cv2.imdecode(np.frombuffer(images[0], np.uint8), cv2.IMREAD_GRAYSCALE)
    assert image.shape == (60, 8 * 90 + 7 * 2)
    assert np.array_equal(image[:, :90], strips("")[0])
    assert np.array_equal(image[:, -90:], strips("")[-1])


def test_large_and_short_clips_make_strips(whole: Path) -> None:
    mistakes = worst_mistakes(read_run(whole), lambda key: np.zeros((3, 512, 256), np.uint8))
    image = base64.b64decode(mistakes["False positives"][0].image.partition(",")[2])
    decoded = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_GRAYSCALE)
    assert decoded.shape == (128, 3 * 64 + 2 * 2)


def test_strips_of_channels_are_in_colour(whole: Path) -> None:
    clip = np.zeros((3, 40, 30, 2), np.uint16)
    clip[..., 1] = 65535
    mistakes = worst_mistakes(read_run(whole), lambda key: clip, ("dapi", "gfp"))
    mistake = mistakes["False positives"][0]
    assert mistake.frames == "3 of 3 frames; dapi red, gfp green"
    image = base64.b64decode(mistake.image.partition(",")[2])
    decoded = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
    # Blue, green and red of OpenCV.
    assert (decoded[:, :30] == (0, 255, 0)).all()


def test_area_under_the_drawn_precision_and_recall_is_the_average_precision(whole: Path) -> None:
    run = read_run(whole)
    assert run.evaluation is not None
    assert run.predictions is not None
    line = precision_recall(run.predictions, run.evaluation).lines[0]
    recall, precision = np.asarray(line.get_data())
    held = {"steps-post": precision[:-1], "steps-pre": precision[1:]}[line.get_drawstyle()]
    assert np.sum(np.abs(np.diff(recall)) * held) == pytest.approx(run.evaluation.ap, abs=1e-5)


def test_page_warns_of_what_cannot_be_believed(training: Path) -> None:
    """A threshold fitted on the same clips, and BatchNorm statistics that do not fit."""
    write_predictions(training, splits=("val",))
    metrics = training / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[79]["norm/gap"], lines[159]["norm/gap"] = 0.31, 4.0
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(training))
    assert "Optimistic" in page.text
    assert "was above 0.3 at the end of 2 of 8 epochs (4.00 at step 160)" in page.text
    assert "without the store of clips" in page.text
    assert page.images("png") == []


@pytest.mark.parametrize("on_all", [False, True])
def test_page_without_predictions_has_curves_and_says_what_adds_the_rest(
    training: Path, on_all: bool
) -> None:
    if on_all:
        on_all_clips = {"settings": {"split": {"train_on_all": True}}}
        _write_record(training, read_record(training) | on_all_clips)
    page = Page(write_report(training, clips=strips))
    assert [section["id"] for section in page.all("section")] == SECTIONS
    assert len(page.images("svg+xml")) == 9
    assert ("dist-train predict --store predicts those of" in page.text) is on_all
    assert ("dist-train predict adds them" in page.text) is not on_all
    assert "held out, last epoch" in page.text


def test_page_of_the_first_step(training: Path) -> None:
    (training / "config.yaml").unlink()
    metrics = training / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    text = Page(write_report(training)).text
    assert "1 step · 0 epochs" in text
    assert "no config.yaml" in text


def test_the_page_says_how_probabilities_were_calibrated(finished: Path) -> None:
    val = read_predictions(finished / "predictions.csv").query("split == 'val'")
    fitted = fit(val["probability"], val["label"], batches_share=0.25, prior=0.04)
    (finished / "calibration.json").write_text(fitted.model_dump_json())
    text = Page(write_report(finished)).text
    assert fitted.method == "none"
    told = "no mapping (of none, temperature, by cross-validated log loss on 60 val clips, 15 posi"
    assert told in text
    assert "then from 25.0% positives to 4.0%" in text
    assert "Log loss on val, cross-validated" in text


def test_a_step_redone_after_a_resume_counts_once(training: Path) -> None:
    metrics = training / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    again = json.loads(lines[99]) | {"train/loss": 123.0}
    metrics.write_text("".join([*lines[:110], json.dumps(again) + "\n", *lines[110:]]))
    steps = read_run(training).steps
    assert steps.index.tolist() == list(range(1, 321))
    assert steps["train/loss"][100] == 123


def test_a_line_that_is_still_being_written_is_left_out(training: Path) -> None:
    metrics = training / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-30])
    assert read_run(training).last_step == 319
    metrics.write_text('{"step": 1, "tr')
    with pytest.raises(RunError, match="no step has finished"):
        read_run(training)
    metrics.unlink()
    with pytest.raises(RunError, match="dist-train train"):
        read_run(training)


@pytest.mark.parametrize("garbage", [b"{oops\n", b"\xff\n", b"[1]\n", b'{"epoch": 1}\n', b"\n"])
@pytest.mark.parametrize("place", [4, 320])
def test_a_whole_line_that_is_no_step_is_an_error(
    training: Path, garbage: bytes, place: int
) -> None:
    metrics = training / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([*lines[:place], garbage, *lines[place:]]))
    with pytest.raises(RunError, match=f"line {place + 1}"):
        read_run(training)


@pytest.mark.parametrize(
    ("name", "content"), [("evaluation.json", "{}"), ("run.json", "{"), ("run.json", "[]")]
)
def test_unreadable_files_are_named(finished: Path, name: str, content: str) -> None:
    (finished / name).write_text(content)
    with pytest.raises(RunError, match=re.escape(name)):
        read_run(finished)


def test_metrics_are_those_of_the_predictions_whatever_evaluation_json_says(finished: Path) -> None:
    expected = evaluate(finished / "predictions.csv", out=finished / "evaluation.json")
    forged = expected.model_copy(update={"mcc": 0.99, "auc": 0.99, "threshold": 0.99})
    (finished / "evaluation.json").write_text(forged.model_dump_json())
    assert read_run(finished).evaluation == expected
    given = evaluate(finished / "predictions.csv", out=finished / "evaluation.json", threshold=0.25)
    assert read_run(finished).evaluation == given


def test_a_column_that_new_predictions_lack_is_left_out(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = evaluate(finished / "predictions.csv").model_copy(update={"by": "centre"})
    (finished / "evaluation.json").write_text(given.model_dump_json())
    read = read_run(finished).evaluation
    assert read is not None
    assert read.by is None
    assert "its column is not used (there is no column 'centre')" in caplog.text
