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
