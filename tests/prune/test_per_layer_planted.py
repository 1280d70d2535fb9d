"""The planted proof for widths of their own: some parts of a UNet get twins, others do not; one ranking tells which."""

import pytest
import torch

from compress.models.inputs import predict, small_inputs
from compress.prune.per_layer import Config, prune_per_layer
from tests.prune.architectures import ARCHITECTURES, UNet, random_unet
from tests.prune.calibrated import calibration_of
from tests.prune.widen import Layout, Widener, empty_wide


class Streams:
    """Which streams are read side by side, so that they lose the same share."""

    def __init__(self) -> None:
        self.leader: dict[str, str] = {}

    def find(self, name: str) -> str:
        leader = self.leader.setdefault(name, name)
        return name if leader == name else self.find(leader)

    def tie(self, one: str, other: str) -> None:
        self.leader[self.find(one)] = self.find(other)


class PartlyWidener(Widener):
    """Doubles all channels: in half of the parts by twins that nobody reads, in the others by sharing what is read."""

    def __init__(self, small: UNet, wide: UNet, heads: str, streams: Streams) -> None:
        super().__init__(small, wide, heads)
        self.streams = streams
        self.names: dict[int, str] = {}  # of layouts that are streams
        self.held: list[Layout] = []
        self.dead: dict[str, bool] = {}
        self.sizes: dict[str, int] = {}
        self.surplus = 0

    def pairs(self, dead: torch.Tensor) -> Layout:
        """Two of each channel: of a dead pair one is read, of a living one both are, together as much."""
        twins = Layout.twins(len(dead))
        share = 0.3 + 0.4 * torch.rand(len(dead))
        living = torch.stack([share, 1 - share], 1).flatten()
        return Layout(twins.source, torch.where(dead.repeat_interleave(2), twins.original.float(), living))

    def twins(self, name: str, size: int) -> Layout:
        if name.endswith(".ff"):  # nothing ties one hidden channel to another
            layout = self.pairs(torch.rand(size) < 0.5)
        else:
            part = self.streams.find(name)
            dead = self.dead.setdefault(part, bool(torch.rand(()) < 0.5))
            layout = self.pairs(torch.full((size,), dead))
        self.names[id(layout)] = name
        self.held.append(layout)  # so that no other gets its id
        self.sizes[name.removesuffix(".conv1")] = len(layout.kept)
        return layout

    def scores_and_values(self, name: str, size: int, heads: int) -> tuple[Layout, Layout]:
        if self.heads == "remove":
            per_head = self.pairs(torch.rand(heads) < 0.5)
            inside = torch.arange(size // heads)
            source = (per_head.source[:, None] * len(inside) + inside).flatten()
            scores = values = Layout(source, per_head.original.repeat_interleave(len(inside)))
        else:
            number = int(torch.randint(size // heads + 1, ()))  # dead in each head
            scores, values = (
                self.pairs(torch.cat([torch.randperm(size // heads) < number for _ in range(heads)])) for _ in range(2)
            )
        self.sizes[name] = len(values.kept)
        return scores, values

    def side_by_side(self, x: Layout, skip: Layout) -> Layout:
        self.streams.tie(self.names[id(x)], self.names[id(skip)])
        return super().side_by_side(x, skip)

    def layer(self, name: str, into: Layout, out: Layout) -> None:
        super().layer(name, into, out)
        weight, bias = self.wide.get_submodule(name).weight, self.wide.get_submodule(name).bias
        kernel = weight[0, 0].numel()
        self.surplus += weight.numel() - kernel * len(into.kept) * len(out.kept)
        self.surplus += 0 if bias is None else len(bias) - len(out.kept)

    def norm(self, name: str, layout: Layout) -> None:
        super().norm(name, layout)
        self.surplus += 2 * (len(layout.source) - len(layout.kept))


def widen_parts(small: UNet, heads: str) -> tuple[UNet, PartlyWidener]:
    """A UNet twice as wide of the same function, and the walk that knows what of it is superfluous."""
    streams = Streams()
    PartlyWidener(small, empty_wide(small, heads), heads, streams).run()  # only tells which streams meet
    wide = empty_wide(small, heads)
    walk = PartlyWidener(small, wide, heads, streams)
    walk.run()
    return wide, walk


CASES = [
    # A single head cannot be removed, and stock heads of one width in all levels cannot be twice as wide.
    *(
        (name, "remove" if name in ("ddpm with heads", "bk-sdm base", "bk-sdm tiny") else "narrow")
        for name in ARCHITECTURES
    ),
    *((name, "remove") for name in ("sd 1.x", "sd 2.x")),
]


@pytest.mark.parametrize(
    ("name", "heads", "importance"),
    [*((*case, "l2") for case in CASES), ("bk-sdm small", "narrow", "taylor"), ("ddpm", "narrow", "l1")],
)
def test_just_the_twins_go(name: str, heads: str, importance: str) -> None:
    small = random_unet(name)
    torch.manual_seed(sum(map(ord, name + heads)))
    wide, walk = widen_parts(small, heads)
    inputs = small_inputs(small)
    wanted = predict(small, inputs)
    limit = 1e-5 * wanted.abs().max()
    assert (predict(wide, inputs) - wanted).abs().max() < limit, "the widened model is another function"
    before = {key: tensor.clone() for key, tensor in wide.state_dict().items()}

    config = Config(walk.surplus / wide.num_parameters(), importance=importance, heads=heads, min_share=0)
    calibration = calibration_of(wide) if importance == "taylor" else None
    report = prune_per_layer(wide, config, calibration=calibration)

    assert report.ranked
    assert report.params_after == wide.num_parameters() - walk.surplus == report.unet.num_parameters()
    after = {width.name: width.after for width in report.widths}
    assert after.items() >= {(key, size) for key, size in walk.sizes.items() if key in after}
    assert {width.before // width.after for width in report.widths} == {1, 2}, "all parts were alike"
    assert report.kept == walk.outputs
    assert (predict(report.unet, inputs) - wanted).abs().max() < limit
    assert all(torch.equal(tensor, before[key]) for key, tensor in wide.state_dict().items()), "the given one changed"
