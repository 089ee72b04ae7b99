"""The settings tree: what it accepts, what it refuses, and how it says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import ROOT
from pydantic import ValidationError

from dist_train.config import Config, PlanSettings, changes, dump_config, load_config
from dist_train.errors import ConfigError
from dist_train.metrics import METRICS


def message(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["store=s", *overrides])
    return str(caught.value)


#: Files of sweeps are read in tests/sweep.
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.stem != "ablation"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    assert load_config(path).out != Config(store=Path("s")).out


def test_overrides_win_over_the_file_and_are_yaml_values(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("store: from-file\nseed: 3\nplan: {batch: 16}\noptim: {lr: 1e-3}\n")
    config = load_config(
        path, ["plan.batch=64", "clip.size=[8, 9]", "optim.clip_norm=null", "snapshots.at=[1, 2]"]
    )
    assert (config.store, config.seed) == (Path("from-file"), 3)
    assert config.plan == PlanSettings(batch=64)
    assert config.clip.size == (8, 9)
    assert config.optim.lr == 1e-3
    assert config.optim.clip_norm is None
    assert config.snapshots.at == (1, 2)


def test_dump_and_load_give_an_equal_tree(tmp_path: Path) -> None:
    settings = ["store=a=b", "optim.lr=3.3e-7", "snapshots.at=[2]", "model.activation_memory=8GiB"]
    config = load_config(None, [*settings, "clip.max_frames=7", "clip.size=[4, 5]"])
    assert config.store == Path("a=b")
    dump_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


def test_changes_are_named_with_both_values(tmp_path: Path) -> None:
    before = load_config(None, ["store=a", "clip.growth=[{epochs: 2, size: [64, 64]}]"])
    dump_config(before, tmp_path / "config.yaml")
    assert changes(load_config(tmp_path / "config.yaml"), before) == []
    now = load_config(None, ["store=b", "clip.size=[128, 128]", "plan.weights=w.csv"])
    assert changes(before, now) == [
        "store: a before, b now",
        "clip.size: (160, 160) before, (128, 128) now",
        "clip.growth: ({'epochs': 2, 'size': (64, 64), 'max_frames': None},) before, () now",
        "plan.weights: None before, w.csv now",
    ]


@pytest.mark.parametrize(("given", "size"), [("8GiB", 2**33), ("1.5 GB", 1_500_000_000)])
def test_memory_is_given_with_its_unit(given: str, size: int) -> None:
    config = load_config(None, ["store=s", f"model.activation_memory={given}"])
    assert config.model.activation_memory == size


def test_the_tree_is_frozen() -> None:
    config = Config(store=Path("s"))
    with pytest.raises(ValidationError, match="frozen"):
        config.plan.batch = 8


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("plan.bach=8", "plan.batch"),
        ("trian.epochs=8", "train.epochs"),
        ("batch=8", "plan.batch"),
        ("seeed=8", "seed"),
    ],
)
def test_an_unknown_key_names_its_nearest_match(override: str, nearest: str) -> None:
    key = override.partition("=")[0]
    assert message(override) == (
        f"command line: unknown setting '{key}'. Did you mean '{nearest}'?"
    )


def test_an_unknown_key_that_is_like_no_other_lists_the_sections() -> None:
    assert "Known sections: out, store, seed" in message("zzzzzz=1")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        # Forms and sections.
        ("plan.batch", "'plan.batch' is not of the form key=value"),
        ("=3", "unknown setting ''"),
        ("optim.clip_norm=", "gives no value. Write null for none."),
        ("clip.size=[1, 2", "the value of 'clip.size=[1, 2' is not valid YAML"),
        ("plan=3", "setting 'plan': Input should be a section"),
        ("plan={batch: 8, batch: 16}", "'batch' is already on line 1"),
        ("seed=" + "[" * 3000, "nested too deeply"),
        (".".join("a" * 3000) + "=1", "nested too deeply"),
        ("clip.growth=[{epochs: 1, size: [8, 8], x: 1}]", "unknown setting 'clip.growth.0.x'"),
        # Types.
        ("plan.batch=many", "setting 'plan.batch': Input should be a valid integer, not \"many\""),
        ("optim.lr=true", "setting 'optim.lr': Input should be a valid number, not true"),
        ("seed=010", "setting 'seed': Input should be a valid integer, not \"010\""),
        ("seed=0x10", "valid integer"),
        ("seed=1_000", "valid integer"),
        ("seed=1:30", "valid integer"),
        ("seed='3'", "valid integer"),
        ("seed=&a [1]", "valid integer"),
        ("seed=" + "9" * 5000, "'seed': Input should be a valid integer"),
        ("train.epochs=3.0", "valid integer"),
        ("train.offload=yes", "'train.offload': Input should be true or false, not \"yes\""),
        ("out=2024", "setting 'out': Input should be text; put it in quotes if it is meant"),
        ("plan.ratio=4", "'plan.ratio': Input should be a list of 2, a number by class, balanced"),
        ("plan.ratio=[1, 2, 3]", "a number by class, balanced or natural, not [1, 2, 3]"),
        ("clip.size=[8]", "setting 'clip.size.1': it must be given"),
        ("model.activation_memory=8 pints", "'model.activation_memory': could not interpret"),
        ("model.activation_memory=8,5GiB", "it must be a number of bytes, such as 8GiB"),
        # Values.
        ("train.epochs=0", "setting 'train.epochs': Input should be greater than or equal to 1"),
        ("optim.lr=.inf", "setting 'optim.lr': Input should be a finite number"),
        ("optim.lr=1e308", "'optim.lr': Input should be less than or equal to 10"),
        (f"seed={2**63}", "setting 'seed': Input should be less than"),
        ("clip.size=[1000000, 1000000]", "'clip.size.0': Input should be less than or equal to"),
        ("plan.ratio=[0, 3]", "'plan.ratio.0': Input should be greater than or equal to 1, not 0"),
        ("out=''", "setting 'out': a path must not be empty"),
        ("train.backend=fsdp", "Input should be 'ddp', 'zero1', 'zero2', 'zero3' or 'fsdp2'"),
        ("checkpoint.best=mcc", "'checkpoint.best': there is no metric 'mcc'; there are val/loss,"),
        ("snapshots.at=[0]", "'snapshots.at': Input should be 'minima'; or: Input should be great"),
        # Settings that do not fit each other.
        ("train.offload=true", "'train': offload works under ZeRO only"),
        ("train={graphs: true, backend: zero1}", "graphs work under backend: ddp only, in bf16"),
        ("train={graphs: true, precision: fp16}", "graphs work under backend: ddp only, in bf16"),
        ("plan.ratio={a: 0}", "'plan.ratio.a': Input should be greater than or equal to 1, not 0"),
        ("plan.ratio=even", "'plan.ratio': Input should be 'balanced' or 'natural', not \"even\""),
        ("plan={ratio: natural, balance_groups: true}", "leave out weights and balance_groups"),
        (
            "plan={batch: 30, ratio: [1, 3]}",
            "'plan': batch 30 is not a multiple of positives + negatives = 4",
        ),
        ("split.fold=5", "setting 'split': fold 5 does not exist: folds are 0 to 4"),
        ("model={activation_memory: 8GiB, recompute: block}", "leave out recompute: block"),
        ("snapshots.at=[21]", "snapshots.at names epoch 21, but train.epochs is 20"),
    ],
)
def test_a_bad_override_is_refused_in_one_line(override: str, part: str) -> None:
    text = message(override)
    assert text.startswith("command line: ") or override.startswith(("snapshots", "a.a"))
    assert part in text
    assert "\n" not in text
    assert len(text) < 500


@pytest.mark.parametrize("setting", ["model.recompute=cheap", "model.activation_memory=8GiB"])
def test_cuda_graphs_do_not_recompute(setting: str) -> None:
    assert "leave out model.recompute and model.activation_memory, or train.graphs" in message(
        "train.graphs=true", setting
    )


def test_an_override_that_goes_through_a_plain_value_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("plan: 3\n")
    assert "'plan.batch': 'plan' is not a section" in message("plan.batch=4", path=path)


def test_a_ratio_is_replaced_as_a_whole_and_may_name_any_class(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("store: s\nplan: {ratio: {a: 1, b: 2, c: 3}}\n")
    for override in ("plan.ratio={v1.0: 1, no: 3}", "plan={ratio: {v1.0: 1, no: 3}, batch: 32}"):
        config = load_config(path, [override])
        assert config.plan.ratio == {"v1.0": 1, "no": 3}
        dump_config(config, tmp_path / "again.yaml")
        assert load_config(tmp_path / "again.yaml") == config
    assert load_config(path, ["plan.ratio=[1, 3]"]).plan.ratio == (1, 3)
    before = load_config(path)
    assert changes(before, config) == [
        "plan.ratio: {'a': 1, 'b': 2, 'c': 3} before, {'v1.0': 1, 'no': 3} now"
    ]


def test_an_override_of_a_section_leaves_its_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("store: s\nplan: {batch: 16, order: random}\n")
    assert load_config(path, ["plan={batch: 8}"]).plan == PlanSettings(batch=8, order="random")


@pytest.mark.parametrize(
    "given",
    [
        ["seed=1", "seed=2"],
        ["plan.batch=8", "plan={batch: 16}"],
        ["plan=3", "plan.batch=8"],
        ["plan.batch=8", "plan=3"],
    ],
)
def test_an_override_that_is_given_twice_is_refused(given: list[str]) -> None:
    assert "is given twice" in message(*given)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"plan: {}\nseed: 2\nplan: {batch: 8}\n", "line 3: 'plan' is already on line 1"),
        (b"clip: {growth: [{epochs: 1, epochs: 2}]}\n", "line 1: 'epochs' is already"),
        (b"optim: &a {lr: 1}\nplan: *a\n", "line 2: an alias ('*name') is not allowed"),
        (b"optim: {<<: {lr: 1}}\n", "unknown setting 'optim.<<'"),
        (b"seed: !!int 010\n", "line 1: a tag"),
        (b"? [1]\n: 2\n", "line 1: a key must be a name"),
        (b"plan: {bacth: 3}\n", "unknown setting 'plan.bacth'. Did you mean 'plan.batch'?"),
        (b"optim.lr: 1\n", "unknown setting 'optim.lr'. Write it below its section"),
        (b"---\nseed: 1\n---\nseed: 2\n", "line 3: but found another document"),
        (b'out: "a\\0b"\n', "setting 'out': a path must not be empty or hold control characters"),
        (b"#" * 2**18 + b"\n", "is longer than 262144 bytes"),
        (b"seed: " + b"[" * 3000, "is not valid YAML (it is nested too deeply)"),
        (b"plan: [1, 2", "is not valid YAML"),
        (b"\xff\xfe\xfa", "is not valid YAML"),
        (b"- 1\n- 2\n", "must hold 'key: value' settings"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    text = message(path=path)
    assert text.startswith(f"{path}: ")
    assert part in text
    assert "\n" not in text
    assert len(text) < 400


@pytest.mark.parametrize("name", ["010", "1e3", "no", "null", "a: b", "2024", "-"])
def test_a_path_like_a_number_comes_back_from_the_record(tmp_path: Path, name: str) -> None:
    config = Config(store=Path("s"), out=Path(name))
    dump_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize("name", ["val/loss", *(f"val/{name}" for name in METRICS)])
def test_the_best_checkpoint_is_chosen_by_a_metric_that_there_is(name: str) -> None:
    assert load_config(None, ["store=s", f"checkpoint.best={name}"]).checkpoint.best == name


def test_a_fifo_or_a_folder_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "is a FIFO, not a plain file" in message(path=tmp_path / "fifo")
    assert "is a folder, not a plain file" in message(path=tmp_path)


def test_a_bad_value_is_blamed_on_whoever_gave_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("plan: {batch: 30, ratio: [1, 3]}\n")
    assert message(path=path).startswith(f"{path}: setting 'plan'")
    assert message("plan.batch=34", path=path).startswith("command line: setting 'plan'")


def test_the_store_is_required() -> None:
    with pytest.raises(ConfigError, match=r"setting 'store': it must be given. Give the folder"):
        load_config(None)


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("# nothing yet\n")
    assert load_config(path, ["store=s"]) == Config(store=Path("s"))


def test_settings_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("store: s\nout: o\ntrain:\n  hang: 7\n  slow: 2.5\n")
    train = load_config(path).train
    assert (train.hang_timeout, train.straggler_ratio) == (7, 2.5)
    train = load_config(path, ["train.hang_timeout=9", "train.slow=3"]).train
    assert (train.hang_timeout, train.straggler_ratio) == (9, 3)
    with pytest.raises(ConfigError, match=r"'train\.straggler_ratio' is given twice"):
        load_config(path, ["train.slow=3", "train.straggler_ratio=4"])
    path.write_text("store: s\nout: o\ntrain:\n  hang_timeout: 7\n")
    assert load_config(path, ["train.hang=9"]).train.hang_timeout == 9
    path.write_text("store: s\nout: o\ntrain:\n  hang_timeout: 7\n  hang: 9\n")
    with pytest.raises(ConfigError, match=r"'train\.hang_timeout' is given twice"):
        load_config(path)


@pytest.mark.parametrize("name", ["out", "model.init", "plan.weights"])
def test_a_url_is_no_folder(name: str) -> None:
    """It would become a folder named "s3:"."""
    with pytest.raises(ConfigError, match=f"'{name}': a path of this machine is needed"):
        load_config(None, ["store=s", f"{name}=s3://bucket/run"])


@pytest.mark.parametrize("place", ["runs/copy", "https://example.org/run"])
def test_a_mirror_is_a_url_that_can_be_written(place: str) -> None:
    with pytest.raises(ConfigError, match="should be a URL such as s3://"):
        load_config(None, ["store=s", f"checkpoint.mirror={place}"])
