"""What a report says of zeros: how many, what they would save, and no speed."""

from typing import Any

from compress.prune import sparse, width
from compress.report import markdown_table, model_card
from compress.report.table import columns


def result(**cost: Any) -> dict[str, Any]:
    dense = {"params": 100, "bytes": 4_000_000, "sparsity": 1e-7, "sparsity_2_4": 0.0, "sparse_bytes": None}
    stage = {"name": "prune", "cost": {**dense, **cost}, "metrics": {}}
    return {"teacher": {"cost": dense, "metrics": {}}, "stages": [stage]}


def test_zeros_have_columns_where_there_are_many() -> None:
    keys = [column.key for column in columns(result())]
    assert keys == ["params", "bytes"]
    keys = [column.key for column in columns(result(sparsity=0.5, sparse_bytes=2_100_000))]
    assert keys == ["params", "bytes", "sparsity", "sparse_bytes"]


def test_the_table_says_what_zeros_are_good_for() -> None:
    text = markdown_table(result(sparsity=0.4987, sparse_bytes=2_100_000))
    assert "| prune | 0.000100 (1.00x) | 4.00 (1.00x) | 49.9 | 2.10 |" in text
    assert "files are no smaller and passes no faster" in text
    assert "2:4" not in text
    grouped = markdown_table(result(sparsity=0.5, sparse_bytes=2_100_000, sparsity_2_4=0.987))
    assert "2:4, of these weights: prune 99 %." in grouped
    assert "which was not measured here" in grouped
    assert "Zeros" not in markdown_table(result())


def test_the_card_names_the_limit() -> None:
    stage = {"name": "prune", "kind": "prune", "method": "sparse", "details": {"sparsity": 0.5, "zeros": {"a": [1, 2]}}}
    stage["declared"] = sparse.STAGE.declared()
    card = model_card({"recipe": "r", "stages": [stage]})
    assert "- sparsity: 0.5" in card
    assert "Weights are zero, not gone" in card
    assert "Weights are zero" not in model_card(
        {"recipe": "r", "stages": [{**stage, "declared": width.STAGE.declared()}]}
    )
