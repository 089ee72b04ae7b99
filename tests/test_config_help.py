"""``dist-train config``: what it says of each setting is true, and so is the page in docs/."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ROOT, said

from dist_train import __version__
from dist_train.config import Config, load_config
from dist_train.config_help import Setting, as_markdown, describe_settings

SETTINGS = {setting.key: setting for part in describe_settings() for setting in part.settings}


def test_the_page_of_settings_is_up_to_date() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == as_markdown(), "run: dist-train config --markdown > docs/settings.md"


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda setting: setting.key)
def test_each_setting_has_a_meaning_and_the_default_that_holds(setting: Setting) -> None:
    assert setting.meaning.endswith(".")
    assert not setting.meaning.endswith("..")
    if setting.default is not None and "[]" not in setting.key:
        given = load_config(None, ["store=s", f"{setting.key}={setting.default}"])
        assert given == Config(store=Path("s"))


@pytest.mark.parametrize(
    ("key", "type", "default"),
    [
        ("store", "path or URL", None),
        ("optim.lr", "number above 0 to 10", "0.001"),
        (
            "plan.ratio",
            "list of 2: integer from 1 to 1024 or mapping to: integer from 1 to 1024 "
            "or balanced or natural",
            "[1, 3]",
        ),
        ("model.dropout", "number from 0 below 1", "0"),
        ("model.activation_memory", "size in bytes, such as 8GiB or null", "null"),
        ("train.precision", "fp32 or bf16 or fp16", "bf16"),
        ("train.hang_timeout", "number above 0 to 40000000 or null", "3600"),
        ("clip.growth[].epochs", "integer from 1 to 1000000", None),
        ("snapshots.at", "minima or list of: integer from 1 to 1000000", "minima"),
    ],
)
def test_types_and_defaults_are_those_of_the_tree(key: str, type: str, default: str) -> None:
    assert (SETTINGS[key].type, SETTINGS[key].default) == (type, default)


def test_the_command_prints_every_setting() -> None:
    printed = said("config").splitlines()
    for key in SETTINGS:
        assert any(line.startswith((f"  {key}=", f"  {key}   (")) for line in printed), key
    assert said("config", "--markdown") == as_markdown()


def test_the_version_is_shown() -> None:
    assert said("--version") == f"dist_train {__version__}\n"
