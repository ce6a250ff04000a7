"""What a table says of times and sizes, and its writers."""

from __future__ import annotations

import pytest

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
