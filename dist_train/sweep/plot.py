"""The plot of a sweep: a line a variant."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from dist_train.evaluation.report_charts import BLUE, MUTED, ORANGE, STYLE
from dist_train.files import write_whole
from dist_train.sweep.results import Results

#: Variants in the plot; a picture of all of a large sweep is higher than PNG writers allow.
MOST_VARIANTS = 200


def draw(results: Results, path: Path) -> None:
    """Write a PNG: each variant's trials, their mean and its interval, and its reference.

    Of more than ``MOST_VARIANTS``, the best are shown.
    """
    table, trials = results.table[:MOST_VARIANTS][::-1], results.trials
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 1.2 + 0.4 * len(table)), layout="constrained")
        axes = figure.subplots()
        done = trials[trials["state"] == "done"]
        for place, row in enumerate(table.to_dict("records")):
            own = done[done["variant"] == row["variant"]][results.metric]
            axes.plot(own, [place] * len(own), "o", color=MUTED, markersize=4, alpha=0.6)
            axes.plot([row["low"], row["high"]], [place, place], color=BLUE)
            axes.plot(row["mean"], place, "o", color=BLUE, markersize=8)
            axes.plot(row["reference"], place, "D", color=ORANGE, fillstyle="none", markersize=8)
        handles = {
            "mean and 95 % interval": axes.plot([], [], "o-", color=BLUE)[0],
            "trial": axes.plot([], [], "o", color=MUTED, markersize=4)[0],
        }
        if table["reference"].notna().any():
            handles["reference"] = axes.plot([], [], "D", color=ORANGE, fillstyle="none")[0]
        axes.set_yticks(range(len(table)), [str(name) for name in table["variant"]])
        axes.set_ylim(-0.6, len(table) - 0.4)
        axes.set_xlabel(results.metric)
        figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=3)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=150)
    write_whole(path, content.getvalue())
