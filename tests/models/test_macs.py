"""Multiply-accumulates are counted at the size of the inputs, whatever the weights are stored in."""

from torch import nn

from compress.models.inputs import example_inputs, small_inputs
from compress.models.macs import count_macs
from tests.tiny import tiny_unet


def test_macs_of_a_convolution_by_hand() -> None:
    unet = tiny_unet()
    macs = count_macs(unet, small_inputs(unet))
    layers = macs.by_module
    assert layers["conv_in"] == 2 * 8 * 8 * 4 * 32 * 9
    assert layers[""] == macs.total
    assert (
        sum(count for name, count in layers.items() if name and type(unet.get_submodule(name)) is nn.Conv2d)
        < macs.total
    )


def test_the_models_own_size_counts_for_more_in_attention() -> None:
    unet = tiny_unet(sample_size=64)
    small, own = count_macs(unet, small_inputs(unet)), count_macs(unet, example_inputs(unet))
    assert own.attention / own.total > small.attention / small.total
