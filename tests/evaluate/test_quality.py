"""All metrics of a set of images: what they look through, how often, and what they do not depend on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compress.errors import UserError
from compress.evaluate import EvaluateConfig
from compress.evaluate.networks import Networks
from compress.evaluate.quality import names, score_images
from compress.evaluate.reference import Reference
from tests.evaluate.parts import TinyInception, tiny_clip
from tests.tiny import WORDS

CAPTIONS = [f"a {WORDS[index % 9 + 1]}" for index in range(11)]
SETS = ("fid", "kid", "precision", "recall", "cmmd")
PAIRS = ("psnr", "ssim", "ms_ssim")
TEXT = ("clip_score", "r_at_1", "r_at_5")


def images(seed: int, n: int = 11) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand(n, 3, 24, 24, generator=generator)
    smooth = torch.nn.functional.interpolate(torch.rand(n, 3, 3, 3, generator=generator), (24, 24), mode="bilinear")
    return (255 * (0.2 * rough + 0.8 * smooth)).byte()


class Counting(TinyInception):
    """Counts the images it sees."""

    seen = 0

    def forward(self, batch):
        self.seen += len(batch)
        return super().forward(batch)


def settings(clip: Path, **changes) -> EvaluateConfig:
    values = {"clip": str(clip), "clip_name": "tiny", "bootstrap": 50, "set_bootstrap": 20, "score_batch_size": 3}
    return EvaluateConfig(**{**values, **changes})


def made(config: EvaluateConfig) -> Networks:
    networks = Networks(config)
    networks.inception = Counting()
    return networks


def real(networks: Networks, n: int = 13) -> Reference:
    keys = networks.keys(sets=True, captions=False)
    return Reference.of("real", {key: networks[key](images(7, n)) for key in keys})


def scored(clip: Path, mine: range = range(11), order: torch.Tensor | None = None, **changes):
    """Everything there is, of some of the images."""
    config = settings(clip, **{"encoders": {"tiny": str(clip)}, **changes})
    networks = made(config)
    chosen = torch.arange(11) if order is None else order
    chosen = chosen[mine.start : mine.stop]
    return score_images(
        images(0)[chosen],
        config,
        networks,
        reference=real(networks),
        teacher=images(0)[chosen] // 2 + images(1)[chosen] // 2,
        captions=[CAPTIONS[index] for index in chosen],
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return Path(tiny_clip(tmp_path_factory.mktemp("scoring") / "clip"))


def alike(a, b, metrics=None, parts=("value", "low", "high"), rel=1e-4):
    for name in metrics or a:
        if a[name] is not None:
            for part in parts:
                if b[name][part] is None:
                    assert a[name][part] is None, (name, part)
                else:
                    assert a[name][part] == pytest.approx(b[name][part], rel=rel, abs=1e-6), (name, part)


def test_every_metric_comes_with_what_it_means(clip):
    found = scored(clip)
    expected = {*SETS, *PAIRS, *TEXT, "fid_teacher", "fd_tiny", "mmd_tiny"}
    assert set(found) == set(names(settings(clip, encoders={"tiny": str(clip)}))) == expected
    for name, metric in found.items():
        assert metric["low"] is None if name == "recall" else metric["low"] <= metric["value"] <= metric["high"], name
        assert metric["n"] == (13 if name == "recall" else 11) or name == "recall"
        assert metric["interval_of"]
        assert (metric["network"] is None) == (name in PAIRS)
    assert {found[name]["network"] for name in ("fid", "kid", "precision", "recall")} == {"tiny-inception"}
    assert found["fid"]["preprocessing"] == "tensorflow1"
    assert found["fid"]["reference"] == "real"
    assert found["fid"]["n_reference"] == 13
    assert len(found["cmmd"]["reference_sha256"]) == 64
    assert found["clip_score"]["network"] == "tiny"
    assert found["clip_score"]["network_sha256"] == found["cmmd"]["network_sha256"]
    assert found["r_at_5"]["among"] == 9
    assert found["fid_teacher"]["reference"] == "the teacher's images"
    json.dumps(found, allow_nan=False)


def test_each_image_passes_each_network_once(clip):
    config = settings(clip)
    networks = made(config)
    reference = real(networks)
    networks.inception.seen = 0
    keep: dict[str, torch.Tensor] = {}
    teacher = score_images(images(1), config, networks, reference=reference, captions=CAPTIONS, keep=keep)
    assert networks.inception.seen == 11
    assert all(teacher[name] is None for name in (*PAIRS, "fid_teacher"))
    torch.testing.assert_close(keep["inception"], TinyInception()(images(1)))
    arguments = {"reference": reference, "teacher": images(1), "captions": CAPTIONS}
    given = score_images(images(0), config, networks, teacher_features=keep, **arguments)
    assert networks.inception.seen == 22
    computed = score_images(images(0), config, networks, **arguments)
    assert networks.inception.seen == 44
    alike(given, computed, rel=1e-9)


def test_the_teacher_itself_is_at_no_distance(clip):
    config = settings(clip)
    found = score_images(images(0), config, made(config), teacher=images(0))
    assert found["fid_teacher"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["psnr"]["equal"] == 11
    assert found["ssim"]["value"] == pytest.approx(1)
    assert all(found[name] is None for name in (*SETS, *TEXT))


def test_batch_size_and_order_change_nothing(clip):
    first = scored(clip)
    alike(first, scored(clip, score_batch_size=11))
    mixed = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    alike(first, scored(clip, order=mixed), parts=("value",))


def test_only_what_is_wanted_is_computed(clip):
    config = settings(clip, leave_out=(*SETS, "fid_teacher", "ssim", "r_at_1"))
    networks = made(config)
    found = score_images(
        images(0), config, networks, reference=Reference.of("real", {}), teacher=images(1), captions=CAPTIONS
    )
    assert set(found) == {"clip_score", "r_at_5", "psnr", "ms_ssim"}
    assert networks.inception.seen == 0
    without = replace(settings(clip), clip=None)
    assert set(names(without)) == {"fid", "fid_teacher", "kid", "precision", "recall", *PAIRS}


def test_images_of_differing_sizes(clip):
    several = [*images(0, 6), *(torch.nn.functional.avg_pool2d(one.float(), (2, 1)).byte() for one in images(1, 5))]

    class Mixed(list):
        def __getitem__(self, chosen):
            return list(super().__getitem__(chosen))

    config = settings(clip)
    networks = made(config)
    found = score_images(
        Mixed(several), config, networks, reference=real(networks), teacher=Mixed(several), captions=CAPTIONS
    )
    assert all(metric is not None and metric["n"] in (11, 13) for metric in found.values())
    swapped = Mixed([*several[1:], several[0]])
    with pytest.raises(UserError, match=r"image 5 has 24x24 pixels, its counterpart 24x12"):
        score_images(Mixed(several), config, networks, teacher=swapped)


def test_preference_models_score_images_with_their_captions(clip, monkeypatch):
    class Liking:
        name, sha256 = "liking", None

        def __call__(self, batch, captions):
            return torch.tensor([float(len(caption)) for caption in captions])

    monkeypatch.setattr("compress.evaluate.networks.preference.load_preference", lambda name, device: Liking())
    config = settings(clip, preference=("hpsv2",))
    found = score_images(images(0), config, made(config), captions=CAPTIONS)
    assert found["hpsv2"]["value"] == pytest.approx(sum(map(len, CAPTIONS)) / 11)
    assert found["hpsv2"]["network"] == "liking"
    assert found["fid"] is None


def test_numbers_that_do_not_fit_are_an_error(clip):
    config = settings(clip)
    with pytest.raises(ValueError, match="expected 11"):
        score_images(images(0), config, made(config), captions=CAPTIONS[:5])
    with pytest.raises(ValueError, match="expected 11"):
        score_images(images(0), config, made(config), teacher=images(0, 4))


def test_networks_load_what_is_asked_for(clip):
    networks = Networks(replace(settings(clip), encoders={"one": str(clip), "two": str(clip)}))
    assert networks.keys(sets=True, captions=True) == ["inception", "clip", "encoder.one", "encoder.two"]
    assert networks.keys(sets=False, captions=True) == ["clip"]
    assert networks.keys(sets=False, captions=False) == []
    assert networks["encoder.one"] is networks["encoder.one"]
    assert networks["clip"].sha256 == networks["encoder.two"].sha256
