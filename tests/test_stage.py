"""What a report says of itself in one line, with no tensor and no list of indices."""

from tiny import tiny_unet

from compress.prune.bk_sdm import prune_bk_sdm
from compress.prune.low_rank import prune_low_rank
from compress.prune.per_layer import prune_per_layer
from compress.prune.sparse import prune_sparse
from compress.quantize.int8 import quantize_weights
from compress.stage import StageReport
from tests.prune.by_magnitude import prune_channels


def test_the_repr_of_a_stage_report_is_one_short_line() -> None:
    coverage = {"params": 0.5812, "macs": 0.58, "modules": 48, "skipped": {"conv_in": "too small"}}
    report = StageReport(coverage, {"kept": list(range(1000))}, {"loss": [[0, 1.0]] * 1000})
    assert repr(report) == "StageReport(48 modules, params 0.58, macs 0.58)"
    assert repr(StageReport({"modules": 3, "macs": None})) == "StageReport(3 modules)"


def test_the_repr_of_every_method_is_one_short_line() -> None:
    reports = [
        prune_channels(tiny_unet(), ratio=0.5),
        prune_per_layer(tiny_unet()),
        prune_low_rank(tiny_unet()),
        prune_sparse(tiny_unet()),
        prune_bk_sdm(tiny_unet(layers_per_block=2), "base"),
        quantize_weights(tiny_unet()),
    ]
    for report in reports:
        text = repr(report)
        assert text.startswith(f"{type(report).__name__}(") and " modules, " in text and len(text) < 90, text
    assert "widths [32, 64] -> [16, 32], params 0." in repr(reports[0])
