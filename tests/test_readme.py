"""The README's examples run as printed, in order, in one session."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.S | re.M)


def test_examples_run_as_printed(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=128)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "float")
    monkeypatch.chdir(tmp_path)
    session = {"path": str(tmp_path / "float")}
    assert len(EXAMPLES) == 3
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), session)
    printed = capsys.readouterr().out
    assert "Linear4bit" in printed and "trainable" in printed
    error = float(next(line for line in printed.splitlines() if re.fullmatch(r"0\.\d+", line)))
    assert 0.05 < error < 0.2
    assert (tmp_path / "model-nf4" / "config.json").exists()


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_files_that_a_page_links_to_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import tables

    return tables


def test_tables_are_what_the_results_files_say(tables):
    """`python -m benchmarks.tables` leaves its pages as they are, and every part is on one of them."""
    pages = [(ROOT / page).read_text() for page in tables.PAGES]
    assert [tables.render(page) for page in pages] == pages
    assert all(sum(f"<!-- {name}:begin -->" in page for page in pages) == 1 for name in tables.PARTS)


def test_the_picture_is_of_the_run_that_the_tables_show(tables):
    run = tables.newest(tables.RESULTS / "layers.jsonl", "linear")
    assert f"run of {run.about['started']}" in (tables.RESULTS / "layers.svg").read_text()


def test_environment_variables_of_the_readme_exist_in_the_sources():
    sources = (ROOT / "setup.py").read_text() + "".join(p.read_text() for p in (ROOT / "csrc").rglob("*.[ch]"))
    for name in set(re.findall(r"BNBQ_[A-Z]+", README)):
        assert name in sources, name
