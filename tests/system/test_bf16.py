"""bfloat16 is taken where it is faster, not where there are instructions for it."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from compress.runtime import inductor, openvino
from compress.system import bf16

TIMES = [(1.0, 0.3, True), (1.0, 0.9, False), (1.0, 1.5, False)]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was measured before is measured again, here and in the tests that follow."""
    bf16.bf16_pays.cache_clear()
    yield
    bf16.bf16_pays.cache_clear()


@pytest.mark.parametrize(("plain", "half", "pays"), TIMES)
def test_it_pays_on_a_cpu_where_products_take_less_time(
    plain: float, half: float, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16, "_seconds", lambda matrix: {torch.float32: plain, torch.bfloat16: half}[matrix.dtype])
    assert bf16.bf16_pays("cpu") is pays
    expected = torch.bfloat16 if pays else torch.float32
    assert inductor.precision("auto", torch.device("cpu")) == expected
    for abilities in (["FP32", "BF16"], ["FP32"]):
        monkeypatch.setattr(openvino, "_core", lambda: SimpleNamespace(get_property=lambda *_: abilities))  # noqa: B023
        assert openvino.precision("auto") == ("bf16" if pays and "BF16" in abilities else "f32")


def test_what_is_asked_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16, "_seconds", lambda matrix: pytest.fail("measured"))
    assert inductor.precision("bf16", torch.device("cpu")) == torch.bfloat16
    assert (openvino.precision("bf16"), openvino.precision("fp32")) == ("bf16", "f32")
    assert not bf16.bf16_pays("mps")


def test_one_slow_product_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter([0.0, 0.0, 1.0, 0.3, 9.0, 0.3, 1.0, 9.0, 1.0, 0.3, 1.0, 0.3])
    monkeypatch.setattr(bf16, "_seconds", lambda matrix: next(taken))
    assert bf16.bf16_pays("cpu")
