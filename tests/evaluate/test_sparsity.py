"""Zeros are counted where they are, and the bytes of the rest are those of a real packing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compress.evaluate.cost import count_zeros, weight_bytes
from compress.evaluate.cost.sparsity import packed_bytes, sparse_bytes
from compress.prune.sparse import Config, prune_sparse
from compress.quantize.int8 import quantize_weights
from tests.tiny import tiny_pipeline, tiny_unet


def packed(tensor: torch.Tensor) -> bytes:
    """A bit for every number, then the values of those that are not zero; or the tensor as it is."""
    plain = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    kept = tensor[tensor != 0].contiguous().view(torch.uint8).numpy().tobytes()
    bits = np.packbits((tensor != 0).flatten().numpy()).tobytes()
    return min(plain, bits + kept, key=len)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
@pytest.mark.parametrize("zeros", [0, 1, 12, 13])
def test_bytes_of_a_tensor(dtype: torch.dtype, zeros: int) -> None:
    tensor = torch.ones(13, dtype=dtype)
    tensor[:zeros] = 0
    assert packed_bytes(tensor) == len(packed(tensor)) <= 13 * tensor.element_size()


def test_2_4_takes_as_much_as_tensor_cores_read() -> None:
    weight = torch.randn(8, 16).half()
    weight[:, ::2] = 0
    values, which = 8 * 16 // 2 * 2, 8 * 16 // 2 * 2 // 8  # half of the values, and two bits for each
    assert packed_bytes(weight) == values + which


def test_a_float_file_is_half_as_large_without_its_zeros(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "dense")
    found = count_zeros(pipeline.unet, tmp_path / "dense" / "unet")
    assert found == {"sparsity": 0, "sparsity_2_4": 0, "sparse_bytes": None}
    report = prune_sparse(pipeline.unet, Config(pattern="2:4", include=["*"]))
    pipeline.save_pretrained(tmp_path / "sparse")
    found = count_zeros(pipeline.unet, tmp_path / "sparse" / "unet")
    assert (found["sparsity"], found["sparsity_2_4"]) == (0.5, 1)
    size, by_dtype = weight_bytes(tmp_path / "sparse" / "unet")
    assert size == weight_bytes(tmp_path / "dense" / "unet")[0], "zeros take as much room as other numbers"
    file = tmp_path / "sparse" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    assert found["sparse_bytes"] == size - by_dtype["F32"] + sum(len(packed(tensor)) for tensor in tensors.values())
    assert found["sparse_bytes"] == size - by_dtype["F32"] + report.sparse_bytes
    assert 0.5 < found["sparse_bytes"] / size < 0.56


def test_int8_zeros_count(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    prune_sparse(pipeline.unet, Config(sparsity=0.75))
    quantize_weights(pipeline.unet)
    pipeline.save_pretrained(tmp_path)
    found = count_zeros(pipeline.unet, tmp_path / "unet")
    assert 0.7 < found["sparsity"] < 0.8
    size, by_dtype = weight_bytes(tmp_path / "unet")
    assert found["sparse_bytes"] == sparse_bytes(tmp_path / "unet")
    assert size - 0.7 * by_dtype["I8"] < found["sparse_bytes"] < size - 0.5 * by_dtype["I8"]


def test_rounding_alone_makes_no_model_sparse(tmp_path: Path) -> None:
    unet = tiny_unet()
    quantize_weights(unet)
    unet.save_pretrained(tmp_path)
    found = count_zeros(unet, tmp_path)
    assert 0 < found["sparsity"] < 1 / 32
    assert found["sparse_bytes"] is None
