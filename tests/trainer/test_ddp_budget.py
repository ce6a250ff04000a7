"""A search on two CPU processes: every rank decides alike, even where the metric differs from rank to rank."""

from __future__ import annotations

from ranks import run_on_ranks, written_by_ranks


def test_ranks_search_alike(tmp_path):
    run_on_ranks("ddp_budget.py", tmp_path)
    for monitor in ("val_rank_loss", "val_acc"):
        ranks = written_by_ranks(tmp_path, monitor)
        assert ranks[0] == ranks[1]
        assert len(ranks[0]["trials"]) > 1, "there was something to search"
