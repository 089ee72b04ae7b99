"""What a run costs on a machine, from what was measured there: hours, device-hours, bytes, and what
binds. The original recipe beside it.

    python tools/cost.py RUN_OR_CONFIG --device CARD --nodes 1 4 16 [--per-node 8]
        [--figures FILE] [--link FILE]

The figures (default benchmarks/gpu/CARD.jsonl) are the results file of 'tools/gpu.py bench', the
link's (for several devices) the JSON of tools/bench_scaling.py. A run is priced by the row of the
bench that trains as it does. No figure is assumed: where one is missing, it says what measures it.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu import VISITS
from rich.console import Console
from rich.table import Table

from dist_train.config import Config, last_of_each, load_config
from dist_train.data.synthetic.challenge_stats import BOX_HEIGHT, BOX_WIDTH, CLIPS_BY_DEPTH
from dist_train.errors import DistTrainError
from dist_train.run.folder import CONFIG

ROOT = Path(__file__).parent.parent
ORIGINAL = ROOT / "configs" / "clog_loss_seed.yaml"
#: Weights and both moments in float32: what a checkpoint holds of each parameter, in bytes; and the
#: gradient that ranks exchange.
STATE_BYTES, GRADIENT_BYTES = 12, 4


class NotMeasuredError(Exception):
    """A figure is missing."""


@dataclass(frozen=True)
class Row:
    """A row of the bench: its settings, and clips a second of one device."""

    name: str
    config: Config
    clips_per_second: float


@dataclass(frozen=True)
class Figures:
    """What was measured on a device. ``None``: not, as is told to whoever needs it.

    Attributes:
        loader: clips a second of one node's input, by whether the device resizes them.
        stall: seconds that a checkpoint costs the steps beside it.
        parameters: of the net of the rows.
        link: bytes a second between two ranks.
    """

    device: str
    rows: tuple[Row, ...]
    loader: dict[bool, float]
    stall: float | None
    parameters: int | None
    link: float | None

    def row(self, config: Config, clips: int) -> Row:
        """That which trains as the config does, at the micro-batch nearest to ``clips``.

        Raises:
            NotMeasuredError: there is none; it names the nearest one and how it differs.
        """
        if not self.rows:
            raise NotMeasuredError(
                f"no step was measured on {self.device}: run 'tools/gpu.py bench --out DIR' there"
            )
        apart = {row.name: differences(row.config, config) for row in self.rows}
        same = [row for row in self.rows if not apart[row.name]]
        if not same:
            nearest = min(apart, key=lambda name: len(apart[name]))
            raise NotMeasuredError(
                f"no row of the bench on {self.device} trains as this config does; the nearest is "
                f"'{nearest}', but for {', '.join(apart[nearest])}: set these alike, or add a row "
                "to tools/bench_step.py and tools/gpu_bench.py and measure it"
            )
        return min(same, key=lambda row: abs(math.log(row.config.plan.batch / clips)))

    def needed(self, name: str, value: float | None, command: str) -> float:
        if value is None:
            raise NotMeasuredError(
                f"{name} was not measured on {self.device}: run '{command}' there"
            )
        return value


def differences(row: Config, config: Config) -> list[str]:
    """Settings that change the time of a step, as "model.recompute (none there, cheap here)"."""
    found = []
    for section, names in {
        "model": tuple(name for name in type(config.model).model_fields if name != "init"),
        "train": ("precision", "channels_last", "graphs", "backend", "offload"),
        "plan": ("order", "negatives"),
        "norm": ("fused",),
        "optim": ("fused",),
        "clip": ("size", "max_frames", "growth"),
        "augment": ("device",),
    }.items():
        for name in names:
            there, here = (getattr(getattr(each, section), name) for each in (row, config))
            if there != here:
                found.append(f"{section}.{name} ({there} there, {here} here)")
    return found


@dataclass(frozen=True)
class Recipe:
    """A name and the settings of a run."""

    name: str
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
    parser.add_argument("--figures", type=Path, help="results file of tools/gpu.py")
    parser.add_argument("--link", type=Path, help="JSON of tools/bench_scaling.py")
    parser.add_argument("--json", type=Path, help="write the figures there, under 'summary'")
    arguments = parser.parse_args()
    try:
        recorded = ROOT / "benchmarks" / "gpu" / f"{arguments.device}.jsonl"
        figures = read_figures(arguments.figures or recorded, arguments.device, arguments.link)
        recipes = [
            Recipe("original", load_config(ORIGINAL)),
            Recipe(str(arguments.run_or_config), settings_of(arguments.run_or_config)),
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
            f"{'original' if recipe is recipes[0] else 'ours'}_hours_{cost.devices}": (
                cost.seconds / 3600
            )
            for recipe, _, cost in found
            if isinstance(cost, Cost)
        }
        text = json.dumps({"summary": summary, "device": arguments.device}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    Console().print(as_table(found, arguments.device, arguments.visits))


def settings_of(path: Path) -> Config:
    """Of a run's folder or a YAML."""
    return load_config(path / CONFIG if path.is_dir() else path)


def read_figures(path: Path, device: str, link: Path | None = None) -> Figures:
    """What 'tools/gpu.py bench' left in its results file; of a figure that came often, the last.

    Args:
        device: "cpu", or a part of the card's name.
        link: what tools/bench_scaling.py wrote.

    Raises:
        NotMeasuredError: nothing was measured, or on another device.
    """
    if not path.is_file():
        raise NotMeasuredError(
            f"nothing was measured on {device} ({path} is not there): run 'tools/gpu.py bench "
            f"--out DIR' there and copy DIR/results.jsonl to it"
        )
    lines = [_parsed(line, path) for line in path.read_text(encoding="utf-8").splitlines()]
    machines = [line for line in lines if line["stage"] == "machine"]
    name = "cpu"
    for machine in machines:
        name = machine.get("card") or machine.get("device", "cpu")
        if device.lower() not in name.lower():
            raise NotMeasuredError(f"{path} is of {name}, not of {device}")
    bench = {line["name"]: line for line in lines if line["stage"] == "bench"}
    rows = tuple(
        Row(row, load_config(None, _settings(line)), line["clips_per_second"])
        for row, line in bench.items()
        if "settings" in line
    )
    saved = bench.get("checkpoint", {})
    stall = saved.get("stall_s")
    bandwidth = None
    if link is not None:
        bandwidth = _parsed(link.read_text(encoding="utf-8"), link)["summary"]["link_gb_per_second"]
    return Figures(
        device=name,
        rows=rows,
        loader={
            on_device: bench[f"loader, {contender}"]["clips_per_second"]
            for on_device, contender in ((False, "ours"), (True, "ours, native"))
            if f"loader, {contender}" in bench
        },
        stall=None if stall is None else stall + max(0.0, saved["slowdown_s"]),
        parameters=saved.get("parameters"),
        link=None if bandwidth is None else bandwidth * 1e9,
    )


def _settings(line: dict[str, Any]) -> list[str]:
    return last_of_each(["store=none", f"model.name={line['model']}", *line["settings"]])


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(text)
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
    group = plan.ratio.group
    if plan.batch % (devices * group):
        return devices, f"plan.batch {plan.batch} is no multiple of {devices * group}"
    bench = "tools/gpu.py bench --out DIR"
    rate = figures.loader.get(recipe.config.augment.device)
    loader = figures.needed("the loader", rate, bench)
    stall = figures.needed("a checkpoint", figures.stall, bench)
    row = figures.row(recipe.config, plan.batch // devices // recipe.config.train.accumulate)
    parameters = figures.needed("a checkpoint", figures.parameters, bench)
    steps = visits / plan.batch
    exchange = 0.0
    if devices > 1:
        link = figures.needed("a link", figures.link, "tools/bench_scaling.py --json FILE")
        # A ring passes each byte twice, less the rank's own share (Thakur et al. 2005).
        size = parameters * GRADIENT_BYTES
        exchange = steps * 2 * (devices - 1) / devices * size / link
    checkpoints = steps / recipe.config.checkpoint.every_steps
    state = parameters * STATE_BYTES
    return Cost(
        devices=devices,
        compute=visits / devices / row.clips_per_second,
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
