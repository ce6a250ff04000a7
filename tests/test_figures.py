"""The figures of README.md and docs/: each has something that prints it, and the cheap ones are held to it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from torch import nn

from tinyq_lightning import quantize
from tinyq_lightning.methods import METHODS
from tinyq_lightning.table import format_bytes

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
DECIMAL = re.compile(r"\d\.\d+|±|\d dB")
SOURCES = [line.split("|")[1:-1] for line in PAGES["figures.md"].splitlines() if line.startswith("| ")][1:]


def shows_figures(text: str) -> bool:
    """Whether a page has a table of measured figures: three lines or more with decimals, as a screen or as Markdown."""
    screens = re.findall(r"^```\n(.*?)^```$", text, re.M | re.S)
    rows = [line for screen in screens if "──" in screen for line in screen.splitlines()]
    rows += [line for line in text.splitlines() if line.startswith("|") and "`.ckpt`" not in line]
    return sum(bool(DECIMAL.search(row)) for row in rows) >= 3


def test_every_page_with_figures_says_what_prints_them():
    told = {name.strip() for pages, *_ in SOURCES for name in pages.split(",")}
    assert {name for name, text in PAGES.items() if shows_figures(text)} <= told
    assert told <= PAGES.keys()


def test_what_prints_the_figures_is_there():
    makefile = (ROOT / "Makefile").read_text()
    bench = ast.parse((ROOT / "examples" / "bench" / "__main__.py").read_text())
    (parts,) = (ast.literal_eval(node.value) for node in bench.body if isinstance(node, ast.Assign))
    for command in re.findall(r"`((?:make|python) [^`]*)`", PAGES["figures.md"]):
        program, what, *words = command.split()
        if program == "make":
            assert re.search(rf"^[\w -]*\b{what}\b[\w -]*:", makefile, re.M), command
        else:
            script = ROOT / what / "__main__.py" if (ROOT / what).is_dir() else ROOT / what
            source = script.read_text()
            assert all(word in source or "parse" in source for word in words if word.startswith("--")), command
        if "--parts" in words:
            named = words[words.index("--parts") + 1 :]
            assert set(named[: next((i for i, w in enumerate(named) if w.startswith("--")), None)]) <= set(parts)


def rows(page: str, heading: str = "") -> dict[str, list[str]]:
    """The rows of a page's tables of Markdown, by their first cell; of the section below a heading, if one is named."""
    text = PAGES[page].partition(heading)[2].partition("\n#")[0] if heading else PAGES[page]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {first: rest for first, *rest in cells if first.strip(":-")}


def test_a_layer_has_the_same_figures_on_both_pages():
    here, there = rows("comparison.md", "## Speed of one layer"), rows("speed.md", "### A layer")
    assert {"float32", "w8a32", "torchao-w8", "torch-w8a8"} <= here.keys()
    assert {name: there[name] for name in here} == here


PRETRAINED = {  # the README's row: the model and its line on the page of methods
    "all-MiniLM-L6-v2": ("encoder", "Lee rho"),
    "Tiara, DNA": ("dna", "contig accuracy"),
    "a digits CNN": ("digits", "accuracy"),
    "g2p_en, GRUs": ("phonemes", "word accuracy"),
    "CREPE, pitch": ("pitch", "within 50 cents"),
}


def screen(page: str, model: str, line: str) -> list[str]:
    """The cells of a line of ``make real-models`` on a page."""
    (found,) = re.findall(rf"^{model} +{line}  +(.*)$", PAGES[page], re.M)
    return re.split(r"  +", found.strip())


@pytest.mark.parametrize("name", PRETRAINED)
def test_pretrained_networks_have_the_same_figures_on_every_page(name):
    model, line = PRETRAINED[name]
    _, *scores, size, times = rows("README.md")[name]
    assert scores == screen("methods.md", model, line)
    relative = screen("methods.md", model, "time")
    assert times == f"{relative[1]}, {relative[3]}"
    floats, int8 = (
        float(number) * {"kB": 1e3, "MB": 1e6}[unit]
        for number, unit in map(str.split, screen("methods.md", model, "weights")[:2])
    )
    assert size == f"{100 * int8 / floats:.0f} %"
    both = screen("four-bits.md", model, line)[:3]
    assert both == [scores[0], scores[1], scores[3]], "w8a16 has no column there"


def test_the_sizes_of_the_digits_network_are_those_of_its_plan(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    digits = pytest.importorskip("digits_data")
    plan = quantize(digits.DigitsNet(), "w8a32")
    sizes = {each.name: f"{format_bytes(each.float_bytes)} {format_bytes(each.bytes)}" for each in plan}
    shown = " ".join(PAGES["README.md"].split())
    for name, size in sizes.items():
        assert re.search(rf"{re.escape(name)} w8a32 spec [^/]*? \d\d\.\d {size}", shown), name
    for name, size in list(sizes.items())[:-1]:
        assert re.search(rf"^{re.escape(name)} .* {size.replace(' kB ', ' kB +')}$", PAGES["command-line.md"], re.M)
    total = [format_bytes(sum(getattr(each, size) for each in plan)) for size in ("float_bytes", "bytes")]
    assert re.search(rf"6 layers {total[0]} {total[1]}", shown)


def test_sizes_and_steps_that_pages_tell_are_those_of_the_methods():
    layer = nn.Sequential(nn.Linear(32, 1000, bias=False))
    (four,), (eight,) = quantize(nn.Sequential(nn.Linear(32, 1000, bias=False)), "w4a8"), quantize(layer, "w8a8")
    assert (four.bytes / 1000, eight.bytes / 1000) == (21, 36)
    assert "a row takes 21 bytes in four bits and 36\n  in eight" in PAGES["four-bits.md"]
    assert 4 + 4 / 32 == 4.125
    assert "4.125 bits a weight" in PAGES["four-bits.md"]
    assert f"max|x| / {2 * METHODS['w8a16'].steps:,}" in PAGES["speed.md"]
    assert f"max|x| / {2 * METHODS['w8a8'].steps:,}" in PAGES["speed.md"]
