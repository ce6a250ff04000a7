"""What a table says of times and sizes, and its writers."""

from __future__ import annotations

import pytest
from torch import nn

from tinyq_lightning import quantize
from tinyq_lightning.report.tables import _change, _milliseconds
from tinyq_lightning.search import BatchTimes
from tinyq_lightning.table import Table


def test_the_first_batch_is_a_warm_up_and_a_few_outliers_are_no_spread():
    times = BatchTimes.of([5.0, *[0.002] * 10, 0.9])
    assert times == BatchTimes(0.002, 0.0, 11)
    assert BatchTimes.of([]).batches == BatchTimes.of([0.1]).batches == 0
    assert BatchTimes.of([]).seconds != BatchTimes.of([]).seconds, "not a number"


@pytest.mark.parametrize(
    ("seconds", "spread", "shown"),
    [
        (0.0021, 0.0001, "2.1 ±0.1"),
        (0.5023, 0.0412, "502 ±41"),
        (0.000012, 4e-7, "0.0120 ±0.0004"),
        (0.004, 0.0, "4.000 ±0.000"),
    ],
)
def test_a_time_is_shown_with_its_spread(seconds, spread, shown):
    assert _milliseconds(BatchTimes(seconds, spread, 9)) == shown


@pytest.mark.parametrize(("now", "shown"), [(0.0021, ""), (0.00185, ""), (0.003, "+50%"), (0.001, "-50%")])
def test_a_difference_within_the_spreads_is_none(now, shown):
    assert _change(BatchTimes(now, 0.0001, 9), BatchTimes(0.002, 0.0001, 9)) == shown


def test_one_table_is_text_markdown_and_html():
    table = Table(["layer", "dB"], [["<b>|a", "-1.5"], ["c", ""]])
    assert table.text().splitlines() == ["layer    dB", "─────  ────", "<b>|a  -1.5", "c"]
    assert table.markdown().splitlines() == ["| layer | dB |", "| :-- | --: |", "| <b>\\|a | -1.5 |", "| c |  |"]
    assert table.html() == (
        "<table><thead><tr><th class=left>layer</th><th>dB</th></tr></thead>"
        "<tbody><tr><td class=left>&lt;b&gt;|a</td><td>−1.5</td></tr>"
        "<tr><td class=left>c</td><td></td></tr></tbody></table>"
    )


def test_a_table_is_wrapped_to_the_width_of_a_screen_in_its_columns_of_text():
    table = Table(
        ["layer", "reason", "size"], [["encoder.layers.10.fc", "int8 took 1.31x the time of float", "66.56 kB"]], left=2
    )
    assert table.text(40).splitlines() == [
        "layer           reason              size",
        "──────────────  ──────────────  ────────",
        "encoder.        int8 took       66.56 kB",
        "layers.10.fc    1.31x the time",
        "                of float",
    ]
    assert table.text(200) == table.text()
    assert max(map(len, table.text(5).splitlines())) < 40, "no narrower than columns can be"


def test_layers_alike_in_all_but_numbers_are_one_row_of_a_grouped_plan():
    model = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(8, 8) for _ in range(12)), "fc1": nn.Linear(8, 8)})
    plan = quantize(model, {"method": "w8a8", "rules": [{"match": "blocks.3", "method": "w8a32"}]})
    names = [row[0] for row in plan.as_table(group=True).rows]
    assert names == ["blocks.* ×11", "blocks.3", "fc1", "13 layers"]
    assert plan.as_table(group=True).rows[-1] == plan.as_table().rows[-1], "the sums are the same"
    assert "lowest SQNR: " in plan.table(group=True)
    assert plan._repr_html_().startswith("<table>")


def plan_of_many_reasons():
    model = nn.ModuleDict({"encoder": nn.ModuleList(nn.Linear(64, 64) for _ in range(4)), "head": nn.Linear(64, 4)})
    why = "left float: int8 took 1.31x the time of float at 64 rows, measured here"
    rules = [
        {"match": f"encoder.{number}", "method": "float", "reason": why, "decided_by": "timing"} for number in (1, 3)
    ]
    return quantize(model, {"method": "w8a8", "rules": rules})


def test_on_a_narrow_screen_reasons_go_below_the_table_once_for_all_layers_that_share_them():
    table = plan_of_many_reasons().as_table()
    for width in (60, 80):
        shown = table.text(width)
        assert max(map(len, shown.splitlines())) <= width
        assert "left float, encoder.1, encoder.3: int8 took 1.31x the time of float" in " ".join(shown.split())
    assert table.text(200) == table.text()


def test_columns_that_say_the_same_in_every_row_are_told_once_on_a_narrow_screen():
    rows = [[f"encoder.layers.{number}.linear1", "w8a8", "spec", "float32 to 9 rows", "1.00 kB"] for number in range(3)]
    table = Table(["layer", "method", "reason", "kernel", "now"], [*rows, ["3 layers", *[""] * 3, "3.00 kB"]], left=4)
    assert table.text(40).splitlines() == [
        "layer                         now",
        "────────────────────────  ───────",
        "encoder.layers.0.linear1  1.00 kB",
        "encoder.layers.1.linear1  1.00 kB",
        "encoder.layers.2.linear1  1.00 kB",
        "3 layers                  3.00 kB",
        "in every row: method w8a8, reason spec,",
        "  kernel float32 to 9 rows",
    ]


def test_a_table_of_many_methods_is_cut_between_them_and_says_again_what_it_is_about():
    names = [f"w{bits}a{other}" for bits in (8, 4) for other in (32, 16, 8)]
    header = ["", "float", *(title for name in names for title in (name, "delta"))]
    table = Table(header, [["val_acc", "0.954687", *["0.953125", "-0.0016"] * 6]], kept=2, step=2)
    parts = table.text(60).split("\n\n")
    assert [part.splitlines()[0].split() for part in parts] == [
        ["float", names[0], "delta", names[1], "delta"],
        ["float", names[2], "delta", names[3], "delta"],
        ["float", names[4], "delta", names[5], "delta"],
    ]
    assert max(map(len, table.text(60).splitlines())) <= 60
    assert all("val_acc  0.954687" in part for part in parts)
