"""A picture file -> normalised patches, as the encoder that will see them was trained.

    load_image      a file -> an RGB picture as a person would see it
    patch_grid      a file -> the grid of its patches (h, w), read from its header
    prepare_image   a picture -> patches (h * w, 3 * p * p) and the grid (h, w)

Sides that are no whole number of patches lose the rest at the right and at the bottom, as in the
published encoders, whose convolution has no padding (SigLIP at 384 px sees 27 x 14 = 378 of them).
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from nanoeemllm.border.files import open_regular, quoted
from nanoeemllm.config import UserError, VisionConfig


def load_image(source) -> Image.Image:
    """source: a path, an open binary file, or a PIL image, which stays as it is. Raises UserError
    for a file that is missing, no picture, cut off, without pixels, or so large that it can only be
    a decompression bomb (over 89 million pixels)."""
    return source if isinstance(source, Image.Image) else _read(source, to_rgb)


def patch_grid(source, vision: VisionConfig) -> tuple[int, int]:
    """The grid that prepare_image will make of what load_image takes."""
    if vision.resize != "native":
        return vision.grid_size, vision.grid_size
    width, height = native_size(*_read(source, _upright_size), vision.image_size,
                                vision.min_image_size)
    return height // vision.patch_size, width // vision.patch_size


def _read(source, function: Callable):
    """function(the picture in a file, or as it is)"""
    if isinstance(source, Image.Image):
        return function(source)
    if isinstance(source, (str, Path)):
        with open_regular(source) as file:
            return _read(file, function)
    if not hasattr(source, "read"):
        raise UserError(f"an image must be a PIL image, a path or an open file, not {source!r:.80}")
    name = quoted(getattr(source, "name", "the picture"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                return function(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{name}: over {Image.MAX_IMAGE_PIXELS:,} pixels; make the picture smaller "
                        "first") from None
    except Exception as error:           # Pillow's readers raise almost anything on broken files
        why = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{name}: not a picture that can be read ({why})") from None


def _upright_size(image: Image.Image) -> tuple[int, int]:
    lies_on_its_side = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return image.size[::-1] if lies_on_its_side else image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """First frame, upright, 8 bits a colour, transparency over white."""
    if not image.width or not image.height:
        raise UserError(f"a picture of {image.width} x {image.height} pixels shows nothing")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits and more. Pillow's own conversion cuts everything above 255 off."""
    pixels = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F":                                # what was resized is a little over its top
        top = 1 if pixels.max() < 1.5 else 255 if pixels.max() < 300 else 65535
    else:
        top = 65535 if image.mode.startswith("I;16") or pixels.max() > 255 else 255
    return Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8))


def prepare_image(image: Image.Image, vision: VisionConfig) -> tuple[Tensor, tuple[int, int]]:
    """Patches (h * w, 3 * p * p), row by row, each channel by channel; and the grid (h, w)."""
    pixels = np.array(_resize(to_rgb(image), vision))                        # (height, width, 3)
    p = vision.patch_size
    h, w = pixels.shape[0] // p, pixels.shape[1] // p
    x = torch.from_numpy(pixels[:h * p, :w * p]).float() / 255
    x = (x - torch.tensor(vision.image_mean)) / torch.tensor(vision.image_std)
    x = x.view(h, p, w, p, 3).permute(0, 2, 4, 1, 3)                         # (h, w, 3, p, p)
    return x.reshape(h * w, vision.patch_dim), (h, w)


def _resize(image: Image.Image, vision: VisionConfig) -> Image.Image:
    size = vision.image_size
    if vision.resize == "native":        # Idefics2 was trained with bilinear resizing
        target = native_size(image.width, image.height, size, vision.min_image_size)
        return image.resize(target, Image.Resampling.BILINEAR)
    if vision.resize == "pad" and image.width != image.height:
        side = max(image.size)
        if side ** 2 > 2 * Image.MAX_IMAGE_PIXELS:
            raise UserError(f"a picture of {image.width} x {image.height} pixels is too long to be "
                            "padded to a square")
        mean = tuple(int(255 * mean) for mean in vision.image_mean)
        square = Image.new("RGB", (side, side), mean)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return image.resize((size, size), Image.Resampling.BICUBIC)


def native_size(width: int, height: int, longest: int, shortest: int) -> tuple[int, int]:
    """(width, height) brought into the bounds, aspect kept where they allow (Idefics2's rule)."""
    aspect = width / height
    if width >= height and width > longest:
        width, height = longest, int(longest / aspect)
    elif height > width and height > longest:
        width, height = int(longest * aspect), longest
    return max(width, shortest), max(height, shortest)
