"""What a run costs on a machine, from what was measured there: hours, device-hours, bytes, and what
binds. The original recipe beside it.

    python tools/cost.py RUN_OR_CONFIG --device h200 --nodes 1 4 16 [--per-node 8] [--figures DIR]

DIR (default benchmarks/DEVICE) holds the JSON files of the benches, as tools/h200.sh leaves them.
No figure is assumed: where one was not measured on that device, it says what measures it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_train.config import Config, load_config
from dist_train.data.clog_loss_facts import BOX_HEIGHT, BOX_WIDTH, CLIPS_BY_DEPTH
from dist_train.errors import DistTrainError
from dist_train.run import CONFIG

ROOT = Path(__file__).parent.parent
ORIGINAL = ROOT / "configs" / "clog_loss_seed.yaml"
#: Clips that the original run looked at, over all its epochs.
VISITS = 9_000_000
#: Weights and both moments in float32: what a checkpoint holds of each parameter, in bytes; and the
#: gradient that ranks exchange.
STATE_BYTES, GRADIENT_BYTES = 12, 4


class NotMeasuredError(Exception):
    """A figure is missing."""


@dataclass(frozen=True)
class Figures:
    """What was measured on a device. ``None``: not, as is told to whoever needs it.

    Attributes:
        clips_per_second: of one device, by row of bench_step.py.
        parameters: of that net.
        loader: clips a second of one node's input.
        stall: seconds that a checkpoint costs the steps beside it.
        link: bytes a second between two ranks.
    """

    device: str
    clips_per_second: dict[str, float]
    parameters: int
    loader: float | None
    stall: float | None
    link: float | None

    def rate(self, row: str) -> float:
        if row not in self.clips_per_second:
            raise NotMeasuredError(
                f"the row '{row}' of the step was not measured on {self.device}: run 'python "
                f"tools/bench_step.py --variants original,fast --json ...' there"
            )
        return self.clips_per_second[row]

    def needed(self, name: str, value: float | None, command: str) -> float:
        if value is None:
            raise NotMeasuredError(
                f"{name} was not measured on {self.device}: run '{command}' there"
            )
        return value


@dataclass(frozen=True)
class Recipe:
    """A name, the row of bench_step.py that it trains as, and its settings."""

    name: str
    row: str
    config: Config


@dataclass(frozen=True)
class Cost:
    """Seconds of all steps by what they wait for, and bytes."""

    devices: int
    compute: float
    loader: float
    exchange: float
    checkpoints: float
    read: float
    written: float

    @property
    def seconds(self) -> float:
        """Input and computing overlap; the exchange is taken not to, which is the worst case."""
        return max(self.compute, self.loader) + self.exchange + self.checkpoints

    @property
    def binds(self) -> str:
        parts = ("compute", "loader", "exchange", "checkpoints")
        return max(parts, key=lambda part: float(getattr(self, part)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(".")[0])
    parser.add_argument("run_or_config", type=Path, help="folder of a run, or a YAML of settings")
    parser.add_argument("--device", required=True, help="as in the name of the GPU, or 'cpu'")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1])
    parser.add_argument("--per-node", type=int, default=8, help="devices of a node (default 8)")
    parser.add_argument("--visits", type=int, default=VISITS, help=f"clips seen ({VISITS:,})")
    parser.add_argument("--figures", type=Path, help="folder of the JSON files")
    parser.add_argument("--json", type=Path, help="write the figures there, under 'summary'")
    arguments = parser.parse_args()
    try:
        folder = arguments.figures or ROOT / "benchmarks" / arguments.device
        figures = read_figures(folder, arguments.device)
        recipes = [
            Recipe("original", "original", load_config(ORIGINAL)),
            Recipe(str(arguments.run_or_config), "fast", settings_of(arguments.run_or_config)),
        ]
        layouts = [(1, 1), *((nodes, arguments.per_node) for nodes in arguments.nodes)]
        found = [
            (recipe, nodes, cost_of(recipe, figures, nodes, per_node, arguments.visits))
            for recipe in recipes
            for nodes, per_node in layouts
        ]
    except (NotMeasuredError, DistTrainError) as error:
        raise SystemExit(f"error: {error}") from None
    if arguments.json:
        summary = {
            f"{recipe.row}_hours_{cost.devices}": cost.seconds / 3600
            for recipe, _, cost in found
            if isinstance(cost, Cost)
        }
        text = json.dumps({"summary": summary, "device": arguments.device}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    Console().print(as_table(found, arguments.device, arguments.visits))


def settings_of(path: Path) -> Config:
    """Of a run's folder or a YAML."""
    return load_config(path / CONFIG if path.is_dir() else path)


def read_figures(folder: Path, device: str) -> Figures:
    """What the benches left in a folder.

    Raises:
        NotMeasuredError: the step was not measured, or on another device.
    """
    step = _read(folder / "step.json")
    if step is None:
        command = "tools/bench_step.py --json" if device == "cpu" else "tools/h200.sh"
        raise NotMeasuredError(
            f"no step was measured on {device} ({folder / 'step.json'} is not there): run "
            f"'{command} {folder}{'/step.json' if device == 'cpu' else ''}' there"
        )
    machine = step["machine"]
    name = machine.get("gpu", machine["device"])
    if device.lower() not in name.lower():
        raise NotMeasuredError(f"{folder / 'step.json'} is of {name}, not of {device}")
    if step["workload"]["frames_scale"] != 1:
        raise NotMeasuredError(
            f"{folder / 'step.json'} is of clips of {step['workload']['frames_scale']:g} of their "
            f"depth: run 'python tools/bench_step.py --scale 1 --json ...' there"
        )
    loader, checkpoint, scaling = (
        (_read(folder / f"{name}.json") or {}).get("summary", {})
        for name in ("loader", "checkpoint", "scaling")
    )
    stall = checkpoint.get("stall_s")
    link = scaling.get("link_gb_per_second")
    return Figures(
        device=name,
        clips_per_second={name: row["clips_per_second"] for name, row in step["variants"].items()},
        parameters=step["workload"]["parameters"],
        loader=loader.get("clips_per_second"),
        stall=None if stall is None else stall + max(0.0, checkpoint.get("slowdown_s", 0.0)),
        link=None if link is None else link * 1e9,
    )


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NotMeasuredError(f"{path} is not JSON ({error}): measure anew") from None
    return content


def cost_of(
    recipe: Recipe, figures: Figures, nodes: int, per_node: int, visits: int
) -> Cost | tuple[int, str]:
    """Of ``visits`` clips on so many nodes; or the number of devices, and why it cannot be cut so.

    Raises:
        NotMeasuredError: a figure is missing that this takes.
    """
    devices, plan = nodes * per_node, recipe.config.plan
    group = sum(plan.ratio)
    if plan.batch % (devices * group):
        return devices, f"plan.batch {plan.batch} is no multiple of {devices * group}"
    loader = figures.needed("the loader", figures.loader, "python tools/bench_loader.py --json ...")
    stall = figures.needed(
        "a checkpoint", figures.stall, "python tools/bench_checkpoint.py --json ..."
    )
    steps = visits / plan.batch
    exchange = 0.0
    if devices > 1:
        link = figures.needed("a link", figures.link, "python tools/bench_scaling.py --json ...")
        # A ring passes each byte twice, less the rank's own share (Thakur et al. 2005).
        size = figures.parameters * GRADIENT_BYTES
        exchange = steps * 2 * (devices - 1) / devices * size / link
    checkpoints = steps / recipe.config.checkpoint.every_steps
    state = figures.parameters * STATE_BYTES
    return Cost(
        devices=devices,
        compute=visits / devices / figures.rate(recipe.row),
        loader=visits / nodes / loader,
        exchange=exchange,
        checkpoints=checkpoints * stall,
        read=visits * clip_bytes(),
        written=checkpoints * state,
    )


def clip_bytes() -> float:
    """Mean size of a stored clip of the challenge: its box, at its own size."""
    clips = sum(CLIPS_BY_DEPTH.values())
    frames = sum(depth * count for depth, count in CLIPS_BY_DEPTH.items()) / clips
    return frames * BOX_HEIGHT[1] * BOX_WIDTH[1]


def as_table(
    found: list[tuple[Recipe, int, Cost | tuple[int, str]]], device: str, visits: int
) -> Table:
    table = Table(title=f"{visits:,} clips on {device}")
    table.add_column("recipe")
    for heading in ("nodes", "devices", "hours", "device-hours", "GB read", "GB written"):
        table.add_column(heading, justify="right")
    table.add_column("what binds")
    for recipe, nodes, cost in found:
        if not isinstance(cost, Cost):
            devices, why = cost
            table.add_row(recipe.name, str(nodes), str(devices), *4 * ["-"], why)
            continue
        hours = cost.seconds / 3600
        table.add_row(
            recipe.name,
            str(nodes),
            str(cost.devices),
            f"{hours:.2f}",
            f"{hours * cost.devices:.1f}",
            f"{cost.read / 1e9:.0f}",
            f"{cost.written / 1e9:.0f}",
            f"{cost.binds}: {getattr(cost, cost.binds) / cost.seconds:.0%}",
        )
    return table


if __name__ == "__main__":
    main()
