"""Order and batch size change no metric, nor its interval, beyond rounding."""

import torch

from tests.evaluate.metrics.results import flat, results, same


def test_order_and_batch_size():
    alone = flat(results(0, 1, 40, torch.arange(40), 0))
    for batch, seed in ((7, 1), (1, 2)):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        same(flat(results(0, 1, batch, order, 0)), alone)
