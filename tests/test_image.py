"""Picture files as a person would see them, and what the encoders are given of them."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from nanoeemllm.config import PRESETS, UserError, VisionConfig
from nanoeemllm.data.images import load_image, native_size, patch_grid, prepare_image, to_rgb

SQUARE, NATIVE, PAD = (PRESETS[name].vision for name in ("eemllm-7b", "eemllm-7b-980", "llava-1.5-7b"))
RED, GREEN = (255, 0, 0), (0, 255, 0)


def stored(image: Image.Image, format: str = "PNG", **options) -> io.BytesIO:
    image.save(file := io.BytesIO(), format, **options)
    file.seek(0)
    return file


def pixel(file, at=(0, 0)) -> tuple:
    image = load_image(file)
    assert image.mode == "RGB"
    return image.getpixel(at)


# ---- files ----


def test_exif_orientation():
    image = Image.new("RGB", (3, 2), "white")
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = load_image(stored(image, exif=exif))
    assert turned.size == (2, 3) and turned.getpixel((1, 0)) == RED


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_over_white(mode):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0)).convert(mode)
    assert pixel(stored(clear, "TIFF" if mode == "PA" else "PNG")) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (1, 1), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)


def test_palette_with_and_without_transparency():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    assert (pixel(stored(image)), pixel(stored(image), (1, 0))) == (RED, GREEN)
    assert (pixel(stored(image, transparency=0)), pixel(stored(image, transparency=0), (1, 0))) == ((255,) * 3, GREEN)


@pytest.mark.parametrize("mode, value", [("L", 100), ("1", 1), ("CMYK", (0, 255, 255, 0)), ("YCbCr", (76, 85, 255))])
def test_grey_and_print_colours(mode, value):
    expected = {"L": (100,) * 3, "1": (255,) * 3}.get(mode, RED)
    got = pixel(stored(Image.new(mode, (4, 4), value), "TIFF"))
    assert max(abs(a - b) for a, b in zip(got, expected)) <= 2


@pytest.mark.parametrize("value, seen", [(0, 0), (65535, 255), (32896, 128), (300, 1)])
def test_sixteen_bits(value, seen):
    image = Image.fromarray(np.full((2, 2), value, dtype=np.uint16))
    assert image.mode == "I;16"
    assert pixel(stored(image)) == pixel(stored(image, "TIFF")) == (seen,) * 3


@pytest.mark.parametrize("mode, high", [("I", 65535), ("I", 255), ("F", 1.0), ("F", 255.0)])
def test_wide_greys_by_their_range(mode, high):
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), high)
    assert [to_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [(0,) * 3, (255,) * 3]


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    lossless = {"lossless": True} if format == "WEBP" else {}
    assert pixel(stored(frames[0], format, save_all=True, append_images=frames[1:], **lossless)) == RED


def png(width: int, height: int) -> bytes:
    """A PNG file that claims a size and brings one row of it."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(width + 1))) + chunk(b"IEND", b""))


@pytest.mark.parametrize("data, said", [
    (b"", "not a picture"), (b"hello", "not a picture"),
    (png(0, 10), "not a picture"), (png(10, 0), "not a picture"),
    (png(100_000, 100_000), "pixels"), (png(10_000, 10_000), "pixels"),
    (stored(Image.effect_noise((64, 64), 50), "JPEG").getvalue()[:900], "not a picture"),
    (stored(Image.effect_noise((64, 64), 50), "PNG").getvalue()[:900], "not a picture"),
    (stored(Image.effect_noise((64, 64), 50), "GIF").getvalue()[:900], "not a picture"),
], ids=["empty", "text", "0 x 10", "10 x 0", "bomb", "smaller bomb", "cut jpeg", "cut png", "cut gif"])
def test_bad_pictures(data, said, tmp_path):
    (tmp_path / "cat.png").write_bytes(data)
    with pytest.raises(UserError, match=said) as error:
        load_image(tmp_path / "cat.png")
    assert "cat.png" in str(error.value) and "\n" not in str(error.value)


def test_missing_picture_and_folder(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(UserError, match="is a folder, not a file"):
        load_image(tmp_path)
    os.mkfifo(tmp_path / "fifo.png")
    for function in (load_image, lambda file: patch_grid(file, NATIVE)):
        with pytest.raises(UserError, match="fifo.png: is not a regular file"):
            function(tmp_path / "fifo.png")
    with pytest.raises(UserError, match="0 x 5"):
        prepare_image(Image.new("RGB", (0, 5)), SQUARE)


# ---- sizes ----


@pytest.mark.parametrize("size, expected", [  # (width, height), by hand from Idefics2's rule
    ((980, 980), (980, 980)), ((4000, 4000), (980, 980)), ((1, 1), (378, 378)), ((5, 3), (378, 378)),
    ((1960, 980), (980, 490)), ((980, 1960), (490, 980)), ((10_000, 10), (980, 378)), ((10, 10_000), (378, 980)),
    ((500, 400), (500, 400)), ((500, 300), (500, 378)), ((981, 700), (980, 699)),
])
def test_native_size(size, expected):
    assert native_size(*size, 980, 378) == expected


@pytest.mark.parametrize("config, size, grid", [
    (SQUARE, (640, 480), (27, 27)), (PAD, (640, 480), (24, 24)), (NATIVE, (4000, 4000), (70, 70)),
    (NATIVE, (1960, 980), (35, 70)), (NATIVE, (391, 378), (27, 27)), (NATIVE, (392, 378), (27, 28)),
])
def test_grids_of_whole_patches(config, size, grid):
    patches, got = prepare_image(Image.new("RGB", size, "white"), config)
    assert got == grid and patches.shape == (grid[0] * grid[1], 588) and patches.dtype == torch.float32


def test_order_of_patches_rows_and_channels():
    config = VisionConfig(image_size=6, patch_size=2)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    patches, _ = prepare_image(Image.fromarray(pixels), config)
    patch = pixels[2:4, 4:6].transpose(2, 0, 1).reshape(-1)  # row 1, column 2: red, green, blue
    assert torch.allclose(patches[1 * 3 + 2], torch.from_numpy(patch / 127.5 - 1).float(), atol=1e-6)


def test_convolution_and_matrix_see_the_same():
    config = VisionConfig(image_size=20, patch_size=4)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8))
    weight = torch.randn(8, 3, 4, 4)
    pixels = torch.from_numpy(np.array(image)).float().permute(2, 0, 1) / 127.5 - 1
    expected = torch.nn.functional.conv2d(pixels[None], weight, stride=4).flatten(2)[0].T
    patches, _ = prepare_image(image, config)
    assert torch.allclose(patches @ weight.flatten(1).T, expected, atol=1e-4)


def test_padding_is_the_mean_colour_and_centred():
    config = VisionConfig(architecture="clip", resize="pad", image_size=30, patch_size=10, image_mean=(0.5, 0.25, 0.75))
    patches, _ = prepare_image(Image.new("RGB", (30, 10), "white"), config)
    middle = patches.view(3, 3, 3, 100)[1]                                   # the row of patches that holds the picture
    colours = patches.view(9, 3, 100).mean(-1)
    assert torch.allclose(colours[0], torch.tensor([127, 63, 191]) / 255 * 2 - torch.tensor([1.0, 0.5, 1.5]), atol=1e-3)
    assert torch.equal(colours[0], colours[7]) and (middle.min() > 0)


@pytest.mark.parametrize("top, over", [(1.0, 1.0001), (255.0, 255.4)])
def test_floats_that_are_a_little_over_their_top_are_not_scaled_down(top, over):
    pixels = np.full((4, 4), top / 2, np.float32)
    pixels[0, 0], pixels[0, 1] = over, np.nan
    assert to_rgb(Image.fromarray(pixels)).getpixel((2, 2)) == (128, 128, 128)


def test_a_strip_that_cannot_be_padded_to_a_square_is_refused():
    with pytest.raises(UserError, match="60000 x 10 pixels is too long"):
        prepare_image(Image.new("RGB", (60000, 10)), PAD)
