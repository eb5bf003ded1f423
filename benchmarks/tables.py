"""Write the README's tables from the results files.

    python -m benchmarks.tables
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def markdown(header: list, rows: list) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def demo() -> str:
    """Size, perplexity and speed of the demo's model."""
    path = RESULTS / "demo.json"
    if not path.exists():
        return "No results yet: `bnbq demo --json benchmarks/results/demo.json`."
    result = json.loads(path.read_text())
    rows = [(r["name"], f"{r['bytes'] / 1e6:.1f}", f"{r['perplexity']:.3f}", f"{r['prefill_tokens_per_second']:.0f}",
             f"{r['decode_tokens_per_second']:.1f}") for r in result["rows"]]
    table = markdown(["model", "MB", "perplexity", "prefill tokens/s", "decode tokens/s"], rows)
    return f"`bnbq demo` on {result['machine']}, {result['threads']} threads, {result['model']}: {result['note']}\n\n{table}"


def layers() -> str:
    """One layer at several batch sizes, from the newest run of benchmarks/against.py."""
    path = RESULTS / "layers.jsonl"
    if not path.exists():
        return "No results yet: `python -m benchmarks.against`."
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [r for r in rows if r["commit"] == rows[-1]["commit"] and (r["n"], r["k"]) == (4096, 4096) and r["threads"] == 1]
    names = list(dict.fromkeys(r["contender"] for r in rows))
    cells = {(r["contender"], r["m"]): f"{r['ms']:.2f} ({r['ms_min']:.2f}-{r['ms_max']:.2f})" for r in rows}
    batches = sorted({r["m"] for r in rows})
    table = markdown(["ms", *(f"m = {m}" for m in batches)], [(name, *(cells[name, m] for m in batches)) for name in names])
    return (f"A 4096 x 4096 layer, bf16 in and out, one thread, cold weights, median (range) of {rows[-1]['rounds']} rounds; "
            f"{rows[-1]['cpu']}, {rows[-1]['isa']} kernels, `python -m benchmarks.against`:\n\n{table}")


def render(readme: str) -> str:
    for name, text in (("demo", demo()), ("layers", layers())):
        readme = re.sub(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", lambda m: f"{m[1]}{text}\n{m[2]}", readme, flags=re.S)
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))
