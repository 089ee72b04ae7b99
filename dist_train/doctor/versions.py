"""Check that all required packages are installed, in supported versions."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dist_train.distributed.hardware import cudnn_name, known_problems
from dist_train.doctor.finding import Finding

PACKAGE = "dist_train"
# Packages that get a line of their own even if they are fine.
SHOWN = ("torch", "accelerate", "deepspeed", "numpy")
#: Optional packages, and the only features that need them.
NEEDED_BY = {
    "deepspeed": "train.backend zero1, zero2 and zero3",
    "transformers": "train.backend zero1, zero2 and zero3",
    "tensorboard": "the files for TensorBoard",
    "av": "videos ('prepare', 'inspect', 'synth')",
    "tifffile": "TIFF stacks ('prepare')",
    "imagecodecs": "compressed TIFF stacks ('prepare')",
    "webdataset": "other readers of a store",
}


def check_versions() -> Iterator[Finding]:
    """Compare Python and the packages with this package's declared requirements."""
    try:
        own = metadata.metadata(PACKAGE)
        needed = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "packages",
            "warn",
            "dist_train is not installed, so its requirements are unknown",
            "Run 'pip install -e .' in the repository.",
        )
        return
    python, needed_python = platform.python_version(), own["Requires-Python"]
    if python in SpecifierSet(needed_python):
        yield Finding("python", "ok", python)
    else:
        found = f"{python}, needed {needed_python}"
        yield Finding("python", "bad", found, "Install a newer Python.")
    installed = {_key(d.metadata["Name"]): d.version for d in metadata.distributions()}
    yield from judge_packages(needed, installed)


def _key(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def judge_packages(needed: Iterable[str], installed: Mapping[str, str]) -> Iterator[Finding]:
    """A finding for each package of ``SHOWN``, and for each missing or unsupported one.

    Args:
        needed: requirements in the form of PEP 508; those of extras are skipped.
        installed: versions by normalised name.
    """
    fine = 0
    for requirement in map(Requirement, needed):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, version = requirement.name, installed.get(_key(requirement.name))
        install = f"Run: pip install '{name}{requirement.specifier}'"
        if version is None and name in NEEDED_BY:
            found = f"not installed; needed for {NEEDED_BY[name]} only"
            yield Finding(name, "warn", found, install)
        elif version is None:
            yield Finding(name, "bad", "not installed", install)
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding(name, "bad", f"{version}, needed {requirement.specifier}", install)
        elif name in SHOWN:
            yield Finding(name, "ok", version)
        else:
            fine += 1
    if fine:
        yield Finding("other packages", "ok", f"{fine} as needed")


def judge_pair(torch: str, cudnn: int | None) -> Iterator[Finding]:
    """Check the pair of torch and cuDNN against the known bad ones.

    Args:
        torch: ``torch.__version__``.
        cudnn: ``torch.backends.cudnn.version()``; None without cuDNN.
    """
    if cudnn is None:
        yield Finding("torch and cuDNN", "ok", f"torch {torch} has no cuDNN: CPU only")
        return
    problems, found = known_problems(cudnn), f"torch {torch}, cuDNN {cudnn_name(cudnn)}"
    for known in problems:
        what = f"{found}: {known.what} ({', '.join(known.precisions)})"
        yield Finding("torch and cuDNN", "warn", what, f"{known.fix} {known.source}")
    if not problems:
        yield Finding("torch and cuDNN", "ok", found)
