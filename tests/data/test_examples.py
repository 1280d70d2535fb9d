"""Examples on disk: the same as in memory, continued after a kill, read lazily; framing; the teacher's own samples."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from pipelines import PIPELINES
from tiny import tiny_pipeline

import compress.data.examples
from compress.data.examples import Examples, cached_examples, encode_examples
from compress.data.framing import Framing, framed
from compress.data.samples import SamplesConfig
from compress.data.tensors import Chunk, cached, filled
from compress.errors import UserError
from tests.distill.worker import images

SAMPLES = SamplesConfig(count=3, steps=2, batch_size=2)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


def same(left: Examples, right: Examples) -> bool:
    rows = left.conditions.rows.keys() == right.conditions.rows.keys() and all(
        torch.equal(tensor, right.conditions.rows[name]) for name, tensor in left.conditions.rows.items()
    )
    return rows and torch.equal(left.latents, right.latents) and torch.equal(left.captions, right.captions)


def test_on_disk_as_in_memory_and_continued_after_a_kill(pipeline, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(compress.data.examples, "_CHUNK", 2)
    options = {"framing": Framing(crop="random", flip=True), "samples": SAMPLES, "seed": 1}
    expected = encode_examples(pipeline, images(), **options)
    assert expected.latents.shape[0] == 6 + 6 + 3
    encode, calls = compress.data.examples.encode_images, []

    def counted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(compress.data.examples, "encode_images", counted)
    with pytest.raises(KeyboardInterrupt):
        cached_examples(pipeline, images(), tmp_path, **options)
    assert not (tmp_path / "examples.safetensors").exists()
    found = cached_examples(pipeline, images(), tmp_path, **options)
    assert len(calls) == 4 + 3  # three of six parts were there
    assert same(found, expected)
    assert same(cached_examples(pipeline, images(), tmp_path, **options), expected) and len(calls) == 7
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "conditions.safetensors",
        "examples.safetensors",
    ]


def test_prompts_alone_give_one_sample_each(pipeline, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a cat", "a dog", "a cat"]})
    examples = cached_examples(pipeline, rows, tmp_path, samples=replace(SAMPLES, count=0), seed=0)
    assert examples.latents.shape == (3, 4, 8, 8) and examples.latents.isfinite().all()
    assert sorted(examples.captions.tolist()) == [1, 1, 2]
    again = encode_examples(pipeline, rows, samples=replace(SAMPLES, count=5), prompts=["a sun"], seed=0)
    assert len(again.latents) == 5 and again.captions.tolist() == [1] * 5
    styles = ["a cat, flat", "a cat, 3d", "a dog, flat", "a dog, 3d"]
    each = encode_examples(pipeline, rows, samples=replace(SAMPLES, count=0), prompts=styles, seed=0)
    assert sorted(each.captions.tolist()) == [1, 2, 3, 4]
    assert not torch.equal(again.latents[0], again.latents[1])  # other noise


def test_images_may_be_left_out_for_samples(pipeline) -> None:
    examples = encode_examples(pipeline, images(), max_examples=0, samples=SAMPLES)
    assert len(examples.latents) == 3
    with pytest.raises(UserError, match="no example"):
        encode_examples(pipeline, images(), max_examples=0)


def test_framing_of_an_image() -> None:
    image = Image.new("RGB", (20, 10))
    image.putpixel((0, 0), (255, 0, 0))
    squeezed = framed(image, Framing(crop="none"), 8, 8, False, seed=0, row=0)
    assert squeezed.size == (8, 8)
    crops = {framed(image, Framing(crop="random"), 10, 10, False, seed=0, row=row).tobytes() for row in range(20)}
    assert len(crops) == 2  # with the red pixel or without
    assert framed(image, Framing(flip=True), 10, 10, True, seed=0, row=0).getpixel((19, 0)) == (255, 0, 0)


def test_a_table_is_mapped_and_a_damaged_one_is_computed_again(tmp_path: Path) -> None:
    made = []

    def part(start: int) -> Chunk:
        made.append(start)
        rows = torch.arange(start, start + 2)
        return Chunk({"a": rows, "b": rows.half()[:, None]}, start + 2, {"fixed": torch.ones(3).bool()}, {"k": "v"})

    file = tmp_path / "table.safetensors"
    tensors, metadata = cached(6, part, file)
    assert tensors["a"].tolist() == list(range(6)) and tensors["b"].shape == (6, 1) and metadata["k"] == "v"
    assert tensors["fixed"].dtype == torch.bool
    cached(6, part, file)
    assert made == [0, 2, 4]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.warns(RuntimeWarning, match=r"table\.safetensors is damaged"):
        tensors, _ = cached(6, part, file)
    assert tensors["a"].tolist() == list(range(6)) and len(made) == 6


def part_of_zeros(start: int) -> Chunk:
    return Chunk({"a": torch.zeros(1, 8)}, start + 1, {}, {})


def test_a_table_may_be_larger_than_memory(tmp_path: Path) -> None:
    file = tmp_path / "table.safetensors"
    rows = 3 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 32
    header = {"a": {"dtype": "F32", "shape": [rows, 8], "data_offsets": [0, 32 * rows]}}
    text = json.dumps(header).ljust(96).encode()
    with file.open("wb") as stream:  # a file of holes, which takes no room
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + 32 * rows)
    tensors, _ = cached(rows, part_of_zeros, file)
    tensors["a"][-1] = 1.0  # a copy: the file stays
    assert tensors["a"].shape == (rows, 8) and not cached(rows, part_of_zeros, file)[0]["a"][-1].any()


def test_a_disk_that_is_too_small_is_said_before_the_first_part_is_written(tmp_path: Path, monkeypatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"table\.safetensors: .*No space left on device.*make room"):
        filled(4, part_of_zeros, tmp_path / "table.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_row_without_a_prompt_is_what_guidance_points_away_from() -> None:
    pipeline = PIPELINES["sdxl"]()
    rows = datasets.Dataset.from_dict({"text": ["a cat", "a dog"]})
    conditions = encode_examples(pipeline, rows, samples=SAMPLES, framing=Framing(resize=8)).conditions
    for name in ("encoder_hidden_states", "added_cond_kwargs.text_embeds"):
        assert not conditions.rows[name][0].any() and conditions.rows[name][1:].any(), "SDXL passes zeros"
    ids = conditions.rows["added_cond_kwargs.time_ids"]
    assert ids[:, 4:].unique().tolist() == [8.0], "the size of the training, in every row"
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert encode_examples(pipeline, rows, samples=SAMPLES).conditions.rows["encoder_hidden_states"][0].any()


def test_parts_of_other_shapes_are_refused() -> None:
    with pytest.raises(UserError, match="different lengths"):
        filled(2, lambda start: Chunk({"a": torch.zeros(1, 3 + start)}, start + 1, {}, {}))
