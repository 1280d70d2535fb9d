"""Which weights are the least, against plain sorting."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.models.sparsity import holds, least_of_groups, smallest


@given(
    parts=st.lists(st.lists(st.integers(-3, 3).map(lambda i: i / 2), min_size=1, max_size=9), min_size=1, max_size=4),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(deadline=None, derandomize=True, max_examples=50)
def test_the_smallest_of_several_tensors(parts: list[list[float]], share: float, dtype: torch.dtype) -> None:
    weights = [torch.tensor(part, dtype=dtype) for part in parts]
    flat = torch.cat(weights).abs()
    count = round(share * len(flat))
    mask = torch.cat(smallest(weights, count))
    assert mask.nonzero().flatten().tolist() == sorted(flat.argsort(stable=True)[:count].tolist())


@given(size=st.integers(2, 6), data=st.data())
@settings(deadline=None, derandomize=True, max_examples=30)
def test_the_largest_of_each_group_stay(size: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, size - 1))
    weight = torch.randint(-3, 4, (2, 3 * size), generator=torch.Generator().manual_seed(size)).float()
    left = weight.masked_fill(least_of_groups(weight, keep, size), 0)
    assert holds(left, keep, size)
    wanted = weight.abs().reshape(-1, size).topk(keep).values.sum(-1)
    assert torch.equal(left.abs().reshape(-1, size).sum(-1), wanted)
