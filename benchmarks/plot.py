"""Draw time over m of one layer: bnbq, its peers, and the limit of the machine.

    python -m benchmarks.plot [--out benchmarks/results/layers]

From the newest complete run of `python -m benchmarks.against`, as PNG and SVG; the same results give the same files.
Needs matplotlib.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from .common import RESULTS, Run, newest, peers  # noqa: E402

WIDTHS = {"4 bits": "bnbq nf4", "8 bits": "bnbq int8"}
COLOURS = {
    "torch bf16": "#555555",
    "torch fp32": "#aaaaaa",
    "torch int4": "#2a9d5c",
    "torch int8": "#2a9d5c",
    "torch dynamic int8": "#9b59b6",
    "bitsandbytes nf4": "#e07b00",
    "bitsandbytes int8": "#e07b00",
}
OURS = "#0b5fff"
STYLE = {
    "svg.hashsalt": "bnbq",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def curve(axes, rows: list[dict], **style) -> None:
    """The medians of rows, by m, and their range as a shade."""
    rows = sorted(rows, key=lambda row: row["m"])
    m = [row["m"] for row in rows]
    axes.plot(m, [row["ms"] for row in rows], **style)
    axes.fill_between(
        m,
        [row["ms_min"] for row in rows],
        [row["ms_max"] for row in rows],
        color=style["color"],
        alpha=0.15,
        linewidth=0,
    )


def draw(run: Run):
    """A figure with a row of panels per thread count and a column per width, for the first shape of the run."""
    n, k = run.rows[0]["n"], run.rows[0]["k"]
    rows = [row for row in run.rows if (row["n"], row["k"]) == (n, k)]
    counts = sorted({row["threads"] for row in rows})
    figure, grid = plt.subplots(
        len(counts),
        len(WIDTHS),
        figsize=(10, 0.8 + 3.6 * len(counts)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for threads, panels in zip(counts, grid, strict=True):
        here = {}
        for row in rows:
            if row["threads"] == threads:
                here.setdefault(row["contender"], []).append(row)
        for (width, ours), axes in zip(WIDTHS.items(), panels, strict=True):
            for name in peers(ours, list(here)):
                curve(axes, here[name], label=name, color=COLOURS[name], linewidth=1.2, marker=".")
            if ours in here:
                curve(axes, here[ours], label=ours, color=OURS, linewidth=2.4, marker="o", markersize=4, zorder=3)
                limit = sorted((row["m"], row["limit_ms"]) for row in here[ours])
                axes.plot(*zip(*limit, strict=True), label=f"limit of {ours}", color="black", linestyle=":")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sorted({row["m"] for row in rows}))
            axes.xaxis.set_major_formatter("{x:.0f}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.25, linewidth=0.5)
            axes.set_title(f"{width}, {threads} thread{'s' * (threads > 1)}", fontsize=9)
            axes.legend(loc="upper left")
        panels[0].set_ylabel("milliseconds")
    for axes in grid[-1]:
        axes.set_xlabel("m, rows of activations")
    about = run.about
    figure.suptitle(
        f"{n} x {k} linear layer, {rows[0]['dtype']}, cold weights: {about['cpu']}, {about['isa']} "
        f"kernels, torch {about['torch']}, bitsandbytes {about['bitsandbytes']}",
        fontsize=10,
    )
    return figure


def main(argv=None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--results", type=Path, default=RESULTS / "layers.jsonl")
    options.add_argument("--out", type=Path, default=RESULTS / "layers", help="without suffix")
    arguments = options.parse_args(argv)
    run = newest(arguments.results, "linear")
    if run is None:
        options.error(f"{arguments.results} has no complete run: python -m benchmarks.against")
    with plt.rc_context(STYLE):
        figure = draw(run)
        about = {"Description": f"run of {run.about['started']}"}
        figure.savefig(arguments.out.with_suffix(".png"), dpi=120, metadata={"Software": None, **about})
        figure.savefig(arguments.out.with_suffix(".svg"), metadata={"Date": None, "Creator": None, **about})
        plt.close(figure)


if __name__ == "__main__":
    main()
