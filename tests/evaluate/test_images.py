"""Images on disk: how they are found and read, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from compress.errors import UserError
from compress.evaluate.images import ImageFiles, ImageSlice, image_files


def noise(seed: int, size: tuple[int, int] = (9, 12), channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze())


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_images_are_found_in_folders_and_read_in_the_order_of_their_names(tmp_path):
    names = ["b.png", "a/z.PNG", "a/deep/y.webp", "c.png"]
    for index, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise(index).save(tmp_path / name, lossless=True)
    (tmp_path / "captions.csv").write_text("file_name,text\n")
    (tmp_path / "._b.png").write_bytes(b"what a Mac leaves")
    files = image_files(tmp_path)
    assert [file.relative_to(tmp_path).as_posix() for file in files] == ["a/deep/y.webp", "a/z.PNG", "b.png", "c.png"]
    images = ImageFiles(files)
    expected = torch.stack([as_tensor(noise(index)) for index in (2, 1, 0, 3)])
    assert len(images) == 4
    assert torch.equal(images[:], expected)
    assert torch.equal(images[1:3], expected[1:3])
    part = ImageSlice(images, range(1, 4))
    assert len(part) == 3
    assert torch.equal(part[1:9], expected[2:])


def test_differing_sizes_come_as_a_list_or_fitted(tmp_path):
    noise(0).save(tmp_path / "a.png")
    noise(1, (20, 10)).save(tmp_path / "b.png")
    files = image_files(tmp_path)
    images = ImageFiles(files)
    assert images.sizes == [(9, 12), (20, 10)]
    assert [image.shape for image in images[:]] == [(3, 9, 12), (3, 20, 10)]
    fitted = ImageFiles(files, fit=(9, 12))[:]
    assert fitted.shape == (2, 3, 9, 12)
    assert torch.equal(fitted[0], as_tensor(noise(0)))
    squeezed = ImageFiles(files, fit=(9, 12), squeeze=True)[:]
    assert torch.equal(squeezed[1], as_tensor(noise(1, (20, 10)).resize((12, 9), Image.Resampling.BICUBIC)))


def test_a_jpeg_is_what_pillow_decodes_and_its_rotation_is_left_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    noise(0).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        expected = as_tensor(opened)
    assert torch.equal(ImageFiles(image_files(tmp_path))[:][0], expected)
    assert expected.shape == (3, 9, 12)


def test_transparent_images_are_laid_on_white(tmp_path):
    image = noise(0, channels=4)
    image.putalpha(Image.fromarray(np.tile(np.array([0, 255, 51], np.uint8), (9, 4))))
    image.save(tmp_path / "a.png")
    palette = noise(1).quantize(8)
    palette.save(tmp_path / "b.png", transparency=3)
    noise(2).save(tmp_path / "c.png")
    images = ImageFiles(image_files(tmp_path))
    assert images.transparent == 2
    found, original = images[:1][0], as_tensor(image)[:3]
    assert (found[:, :, 0] == 255).all()
    assert torch.equal(found[:, :, 1], original[:, :, 1])
    mixed = 255 + (original[:, :, 2].float() - 255) * 0.2
    assert (found[:, :, 2].float() - mixed).abs().max() <= 1
    assert (images[1:2][0].permute(1, 2, 0)[torch.from_numpy(np.array(palette) == 3)] == 255).all()


@pytest.mark.parametrize("mode", ["L", "1", "LA", "I;16", "CMYK"])
def test_images_without_three_colors_are_refused(mode, tmp_path):
    name = "gray.jpg" if mode == "CMYK" else "gray.png"
    image = noise(0, channels=1) if mode == "I;16" else noise(0).convert(mode)
    image = Image.fromarray(np.array(image).astype(np.uint16)) if mode == "I;16" else image
    noise(1).save(tmp_path / "a.png")
    image.save(tmp_path / name)
    said = "CMYK" if mode == "CMYK" else "gray, with one channel"
    with pytest.raises(UserError, match=f"^images: .*{name} is not RGB but {said}"):
        ImageFiles(image_files(tmp_path))


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_a_file_that_is_cut_off_is_named(ending, share, tmp_path):
    noise(1).save(tmp_path / f"a.{ending}")
    file = tmp_path / f"b.{ending}"
    noise(0, (80, 90)).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=f"^reference: .*b.{ending} cannot be read as an image"):
        ImageFiles(image_files(tmp_path), "reference").verify()


def test_damage_in_the_middle_is_named(tmp_path):
    noise(0).save(tmp_path / "0.png")
    noise(0, (80, 90)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "a.png").write_bytes(bytes(content))
    images = ImageFiles(image_files(tmp_path))
    images.verify(range(1))
    for look in (images.verify, lambda: images[1:]):
        with pytest.raises(UserError, match=r"a\.png cannot be read as an image"):
            look()


def test_other_formats_are_refused_whatever_their_ending(tmp_path):
    noise(0).save(tmp_path / "a.png", format="GIF")
    with pytest.raises(UserError, match=r"a\.png is GIF despite its ending"):
        ImageFiles(image_files(tmp_path))


def test_what_is_left_out_is_said(tmp_path, caplog):
    (tmp_path / ".checkpoints").mkdir()
    for name in ("a.png", ".checkpoints/b.png", "c.bmp", "d.tiff"):
        noise(0).save(tmp_path / name)
    assert image_files(tmp_path, "reference") == [tmp_path / "a.png"]
    assert "reference: 2 images with unsupported endings are skipped (.bmp, .tiff)" in caplog.text


def test_animations_are_refused(tmp_path):
    noise(0).save(tmp_path / "a.webp", save_all=True, append_images=[noise(1)])
    with pytest.raises(UserError, match="is an animation"):
        ImageFiles(image_files(tmp_path))


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"images=.*nowhere: expected an existing folder"):
        image_files(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(UserError, match=r"reference=.*has none"):
        image_files(tmp_path, "reference")
    with pytest.raises(UserError, match="images: there are no images"):
        ImageFiles([])
