"""Write the tables of README.md and benchmarks/README.md from the results files.

    python -m benchmarks.tables

Each part is rendered from the newest complete run that has it.
"""

import json
import statistics

from .common import FLOATS, RESULTS, ROOT, Run, newest, peers

NARROW = 1.1  # less than this is no loss: the medians of two rounds differ by as much

BASES = ("quantised", "bf16")

OUTLIERS = {
    "none": "no outliers",
    "6": "outliers in six columns",
    "1%": "outliers in 1% of the columns",
    "40%": "outliers in 40% of the columns",
    "first-token": "massive outliers in three columns of every 256th row",
}


def markdown(header: list, rows: list) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def number(value: float) -> str:
    """Three digits, as far as there are so many."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.{1 if value >= 9.995 else 2}f}"


def ratio(value: float) -> str:
    """How many times faster; a loss is bold."""
    return f"{value:.1f}" if value >= 1 else f"**{value:.2f}**"


def by_threads(cells: dict[int, str]) -> str:
    """ "1.20 / 0.65": one thread / two."""
    return " / ".join(cells[count] for count in sorted(cells))


def plural(count, noun: str) -> str:
    return f"{count} {noun}" + "s" * (str(count) != "1")


def threads_of(rows: list[dict]) -> str:
    """ "1 / 2 threads": what the figures of a cell are."""
    return plural(" / ".join(map(str, sorted({row["threads"] for row in rows}))), "thread")


def machine(about: dict) -> str:
    kernels = f"{', '.join(about['features'])}; {plural(about['cores'], 'core')}, {about['isa']} kernels"
    versions = f"torch {about['torch']}, bitsandbytes {about['bitsandbytes']}, bnbq at commit {about['commit']}"
    return f"{about['cpu']} ({kernels}), {versions}"


def unique(values) -> list:
    return list(dict.fromkeys(values))


def demo() -> str:
    """Size, perplexity and speed of the demo's model."""
    path = RESULTS / "demo.json"
    if not path.exists():
        return "No results yet: `bnbq demo --json benchmarks/results/demo.json`."
    result = json.loads(path.read_text())

    def speed(row, name, digits):
        low, high = row[f"{name}_spread"]
        return f"{row[name]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"

    table = markdown(
        ["weights", "MB", "perplexity", "prompt tokens/s (range)", "text tokens/s (range)"],
        [
            (
                row["name"],
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['perplexity']:.3f}",
                speed(row, "prefill", 0),
                speed(row, "decode", 1),
            )
            for row in result["rows"]
        ],
    )
    return (
        f"`bnbq demo` with {result['model']}: perplexity on {result['windows']} x {result['length']} tokens of "
        f"{result['text']}, speeds on {result['cpu']} with {result['threads']} threads and {result['isa']} "
        f"kernels. The model's linear weights were Q4_1 (4 bits) before: the table compares implementations and is "
        f"no figure for what nf4 costs.\n\n{table}"
    )


# ------------------------------------------------------------------ one layer


def one_shape(run: Run) -> str:
    """Milliseconds of a layer of the first shape that was measured, by m."""
    n, k = run.rows[0]["n"], run.rows[0]["k"]
    rows = [row for row in run.rows if (row["n"], row["k"]) == (n, k)]
    batches, names = unique(row["m"] for row in rows), unique(row["contender"] for row in rows)
    ms, limit = {}, {}
    for row in rows:
        ms.setdefault((row["contender"], row["m"]), {})[row["threads"]] = number(row["ms"])
        limit.setdefault((row["contender"], row["m"]), {})[row["threads"]] = number(row["limit_ms"])
    lines = [(name, *(by_threads(ms[name, m]) for m in batches)) for name in names]
    lines += [
        (f"limit of {name}", *(by_threads(limit[name, m]) for m in batches))
        for name in names
        if name.startswith("bnbq")
    ]
    spreads = sorted((row["ms_max"] - row["ms_min"]) / row["ms"] for row in run.rows)
    return (
        f"Milliseconds of a {n} x {k} layer, {rows[0]['dtype']} in and out (torch fp32 and dynamic int8: fp32), "
        f"{OUTLIERS[rows[0]['outliers']]}, {threads_of(rows)}, cold weights, median of {rows[0]['rounds']} rounds. "
        f"The rounds of a figure range over {statistics.median(spreads):.0%} of it in the middle and "
        f"{spreads[len(spreads) * 9 // 10]:.0%} in one of ten.\n\n"
        + markdown(["ms", *(f"m = {m}" for m in batches)], lines)
    )


def every_shape(run: Run) -> str:
    """How many times faster than bitsandbytes, and than torch's fastest float layer, on one thread."""
    threads = min(row["threads"] for row in run.rows)
    ms = {(row["contender"], row["n"], row["k"], row["m"]): row["ms"] for row in run.rows if row["threads"] == threads}
    shapes = unique((row["n"], row["k"]) for row in run.rows)
    batches = [
        m for m in unique(row["m"] for row in run.rows) if all(("bnbq nf4", *shape, m) in ms for shape in shapes)
    ]
    lines = []
    for n, k in shapes:
        for width in ("nf4", "int8"):
            cells = []
            for m in batches:
                ours = ms[f"bnbq {width}", n, k, m]
                theirs = ms.get((f"bitsandbytes {width}", n, k, m))
                floats = min(ms[name, n, k, m] for name in FLOATS if (name, n, k, m) in ms)
                cells.append(f"{ratio(theirs / ours) if theirs else '-'} / {ratio(floats / ours)}")
            lines.append((f"{n} x {k}", width, *cells))
    return (
        f"Times faster than bitsandbytes' layer of the same width / than torch's fastest float layer, "
        f"{plural(threads, 'thread')} (bold: slower):\n\n"
        + markdown(["layer", "weights", *(f"m = {m}" for m in batches)], lines)
    )


def losses(run: Run) -> str:
    """Where a peer is faster, over every shape, m and thread count."""
    points = {}
    for row in run.rows:
        points.setdefault((row["n"], row["k"], row["m"], row["threads"]), {})[row["contender"]] = row["ms"]
    sentences = []
    for ours in unique(row["contender"] for row in run.rows if row["contender"].startswith("bnbq")):
        lost = []
        for (n, k, m, threads), ms in points.items():
            fastest = min(peers(ours, list(ms)), key=ms.get)
            if ms[ours] > NARROW * ms[fastest]:
                lost.append((ms[ours] / ms[fastest], f"{n} x {k}, m = {m}, {plural(threads, 'thread')}, {fastest}"))
        worst = "; most by {:.1f} times: {}".format(*max(lost)) if lost else ""
        sentences.append(
            f"{ours} is over {NARROW - 1:.0%} slower than the fastest at {len(lost)} of {len(points)} points{worst}."
        )
    return "Where it loses, over every shape, m and thread count, to a peer of as many bits or a float layer: " + (
        " ".join(sentences)
    )


def layers() -> str:
    run = newest(RESULTS / "layers.jsonl", "linear")
    if run is None:
        return "No results yet: `python -m benchmarks.against --all`."
    parts = [
        f"`python -m benchmarks.against --all` on {machine(run.about)}.",
        one_shape(run),
        every_shape(run),
        losses(run),
    ]
    if (RESULTS / "layers.svg").exists():
        parts.insert(1, "![Milliseconds over m, of bnbq, its peers and the limit](benchmarks/results/layers.svg)")
    return "\n\n".join(parts)


def cliffs() -> str:
    """Which rules of layers.py are broken where, what batch invariance costs, and what outliers cost."""
    path = RESULTS / "cliffs.jsonl"
    run, broken = newest(path, "cliff"), newest(path, "violation")
    if run is None:
        return "No results yet: `python -m benchmarks.layers`."
    where = {}
    for row in broken.rows if broken and broken.about == run.about else []:
        where.setdefault((row["contender"], row["threads"], row["rule"]), []).append((row["m"], row["factor"]))
    found = [
        f"- {name}, {plural(threads, 'thread')}, m = {', '.join(str(m) for m, _ in points)}: {rule}, by up to "
        f"{max(factor for _, factor in points):.2f} times"
        for (name, threads, rule), points in where.items()
    ]
    ms = {(row["contender"], row["m"], row["threads"]): row["ms"] for row in run.rows}
    mode = " invariant"
    cost = sorted(
        ms[name, m, threads] / ms[name.removesuffix(mode), m, threads] for name, m, threads in ms if name.endswith(mode)
    )
    first, values = run.rows[0], len({m for _, m, _ in ms})
    return (
        f"Cliffs (`python -m benchmarks.layers`, whose --help has the rules: a {first['n']} x {first['k']} layer, "
        f"{first['dtype']}, {values} values of m, {threads_of(run.rows)}):\n\n"
        + ("\n".join(found) or "- none")
        + "\n\n"
        f"`set_batch_invariant(True)` takes {statistics.median(cost):.2f} times as long in the middle, at most "
        f"{cost[-1]:.2f} times.\n\n" + outliers(newest(path, "outliers"))
    )


def outliers(run: Run) -> str:
    cells = {}
    for row in run.rows:
        line = cells.setdefault(f"{row['contender']}, m = {row['m']}", {})
        line.setdefault(row["outliers"], {})[row["threads"]] = number(row["ms"])
    lines = [(line, *(by_threads(figures[setting]) for setting in OUTLIERS)) for line, figures in cells.items()]
    return f"LLM.int8() by the outliers in x, {threads_of(run.rows)}:\n\n" + markdown(["ms", *OUTLIERS.values()], lines)


# ------------------------------------------------------------------ the rest of against.py


def figures(title: str, kind: str, unit: str, label) -> str:
    """A table of the newest results of a kind; ``label(row)`` gives a figure's line and column."""
    run = newest(RESULTS / "layers.jsonl", kind)
    if run is None:
        return f"{title}: no results yet."
    cells = {}
    for row in run.rows:
        cells.setdefault(label(row), {})[row["threads"]] = number(row[unit])
    lines, columns = unique(line for line, _ in cells), unique(column for _, column in cells)
    table = [(line, *(by_threads(cells.get((line, column), {0: "-"})) for column in columns)) for line in lines]
    return f"{title}, {threads_of(run.rows)}:\n\n" + markdown([unit, *columns], table)


def conversion(row: dict) -> tuple[str, str]:
    library, _, operation = row["contender"].partition(" ")
    return f"{operation}, {row['dtype']}, {row['n']} x {row['k']}", library


def conversions() -> str:
    return figures(
        "Quantising and dequantising a weight, into new memory unless it is reused", "quantize", "ms", conversion
    )


def backward() -> str:
    def label(row):
        return row["contender"], f"{row['n']} x {row['k']}, m = {row['m']}"

    return figures("Forward and gradient to the input, through a frozen weight", "backward", "ms", label)


def call_cost() -> str:
    title = "What a call costs: a layer of 64 x 64, m = 1, eager, without gradients"
    return figures(title, "call", "us", lambda row: (row["contender"], "a call"))


# ------------------------------------------------------------------ models


def loads(run: Run, prefill: int) -> str:
    header = ["weights", "load s", "first forward s", "memory of the load MB", "weights MB"]
    header += ["decode tokens/s", f"prefill {prefill} tokens/s"]
    tokens = {}
    for kind in ("decode", "prefill"):
        for row in newest(RESULTS / "models.jsonl", kind).rows:
            tokens.setdefault((row["contender"], kind), {})[row["threads"]] = number(row["tokens_s"])
    lines = []
    for row in run.rows:
        name, memory = row["contender"], [f"{row[field] / 1e6:.0f}" for field in ("peak", "weights")]
        speeds = [by_threads(tokens[name, kind]) for kind in ("decode", "prefill")]
        lines.append((name, number(row["s"]), number(max(0, row["first"])), *memory, *speeds))
    return (
        "Memory is the most anonymous memory above what imports take; torch's bf16 weights stay in the file's mapping "
        'and are not in it. "First forward" is what the first takes beyond the second.\n\n' + markdown(header, lines)
    )


def steps(run: Run, tokens: int) -> str:
    lines = [
        (row["contender"], f"{row['s']:.2f} ({row['s_min']:.2f}-{row['s_max']:.2f})", f"{row['peak'] / 1e6:.0f}")
        for row in run.rows
    ]
    title = f"A LoRA step on half of the layers, 2 x {tokens} tokens, {threads_of(run.rows)}, all weights in memory"
    return f"{title}:\n\n" + markdown(["base", "s (range)", "memory MB"], lines)


def models() -> str:
    path = RESULTS / "models.jsonl"
    model = newest(path, "model")
    if model is None:
        return "No results yet: `python -m benchmarks.models`."
    shape = model.rows[0]
    parts = [
        f"A Llama of random weights, hidden {shape['hidden']}, {plural(shape['layers'], 'layer')}, intermediate "
        f"{shape['intermediate']}, vocabulary {shape['vocab']}, bf16 (`python -m benchmarks.models` on "
        f"{machine(model.about)})."
    ]
    for kind, part in (("load", loads), ("train", steps)):
        run = newest(path, kind)
        if run is not None:
            parts.append(part(run, shape["prefill"]))
            if run.about["commit"] != model.about["commit"]:
                parts.append(f"These were measured at commit {run.about['commit']}.")
    return "\n\n".join(parts)


def finetune() -> str:
    run = newest(RESULTS / "finetune.jsonl", "finetune")
    if run is None:
        return "No results yet: `python -m benchmarks.finetune`."
    lines = []
    for name in unique(row["format"] for row in run.rows):
        ours, dense = ({row["base"]: row for row in run.rows if row["format"] == name}[base] for base in BASES)
        losses = [f"{row[field]:.4f}" for row in (ours, dense) for field in ("before", "after")]
        difference = f"{100 * (ours['after'] / dense['after'] - 1):+.2f} %"
        lines.append((name, *losses, difference, *(f"{row['seconds']:.0f}" for row in (ours, dense))))
    header = ["base", "before", "after", "before, bf16", "after, bf16", "difference", "s", "s, bf16"]
    about = (
        f"Held-out loss (nats a token) of `bnbq demo`'s model before and after {run.rows[0]['steps']} steps of LoRA "
        "on the quantised base, and of the same on its dequantised weights in bf16 (`python -m benchmarks.finetune` on "
        f"{machine(run.about)})"
    )
    return f"{about}:\n\n" + markdown(header, lines)


PARTS = {
    "demo": demo,
    "layers": layers,
    "cliffs": cliffs,
    "conversions": conversions,
    "backward": backward,
    "calls": call_cost,
    "models": models,
    "finetune": finetune,
}


PAGES = ["README.md", "benchmarks/README.md"]


def render(page: str) -> str:
    """A page with its generated parts replaced."""
    for name, part in PARTS.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, found, rest = page.partition(begin)
        if found:
            page = f"{before}{begin}{part()}\n{end}{rest.partition(end)[2]}"
    return page


if __name__ == "__main__":
    for name in PAGES:
        path = ROOT / name
        path.write_text(render(path.read_text()))
