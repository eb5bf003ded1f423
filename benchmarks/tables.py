"""Write the README's tables from the results files.

    python -m benchmarks.tables
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def markdown(header: list, rows: list) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def spread(row: dict, name: str, digits: int) -> str:
    """Median and range of a speed."""
    low, high = row[f"{name}_spread"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def demo() -> str:
    """Size, perplexity and speed of the demo's model."""
    path = RESULTS / "demo.json"
    if not path.exists():
        return "No results yet: `bnbq demo --json benchmarks/results/demo.json`."
    result = json.loads(path.read_text())
    table = markdown(
        ["weights", "MB", "perplexity", "prompt tokens/s (range)", "text tokens/s (range)"],
        [(row["name"], f"{row['bytes'] / 1e6:.1f}", f"{row['perplexity']:.3f}", spread(row, "prefill", 0),
          spread(row, "decode", 1)) for row in result["rows"]])
    return (f"`bnbq demo` with {result['model']}: perplexity on {result['windows']} x {result['length']} tokens of "
            f"{result['text']}, speeds on {result['cpu']} with {result['threads']} threads and {result['isa']} "
            f"kernels. The model's linear weights were Q4_1 (4 bits) before: the table compares implementations and is "
            f"no figure for what nf4 costs.\n\n{table}")


def layers() -> str:
    """One layer at several batch sizes, from the newest run of benchmarks/against.py."""
    path = RESULTS / "layers.jsonl"
    if not path.exists():
        return "No results yet: `python -m benchmarks.against`."
    every = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in every if row["commit"] == every[-1]["commit"] and row["n"] == row["k"] == 4096]
    rows = [row for row in rows if row["threads"] == 1]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    cells = {(row["contender"], row["m"]): f"{row['ms']:.2f} ({row['ms_min']:.2f}-{row['ms_max']:.2f})" for row in rows}
    batches = sorted({row["m"] for row in rows})
    table = markdown(["ms", *(f"m = {m}" for m in batches)],
                     [(name, *(cells[name, m] for m in batches)) for name in names])
    return (f"A 4096 x 4096 layer, bf16 in and out, six outlier columns, one thread, cold weights, median (range) of "
            f"{rows[-1]['rounds']} rounds on {rows[-1]['cpu']} with {rows[-1]['isa']} kernels "
            f"(`python -m benchmarks.against`):\n\n{table}")


def render(readme: str) -> str:
    """The README with its generated parts replaced."""
    for name, text in (("demo", demo()), ("layers", layers())):
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, _, rest = readme.partition(begin)
        readme = f"{before}{begin}{text}\n{end}{rest.partition(end)[2]}"
    return readme


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
