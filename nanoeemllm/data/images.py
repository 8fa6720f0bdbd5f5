"""A picture file -> normalised patches, as the encoder that will see them was trained.

    load_image      a file -> an RGB picture as a person would see it
    prepare_image   a picture -> patches (h * w, 3 * p * p) and the grid (h, w)

Sides that are no whole number of patches lose the rest at the right and at the bottom, as in the published
encoders, whose convolution has no padding (SigLIP at 384 px sees 27 x 14 = 378 of them).
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from nanoeemllm.config import UserError, VisionConfig


def load_image(file) -> Image.Image:
    """file: a path or an open binary file. Raises UserError for a file that is missing, no picture, cut off,
    without pixels, or so large that it can only be a decompression bomb (over 89 million pixels).
    """
    where = file if isinstance(file, (str, Path)) else getattr(file, "name", "the picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return to_rgb(image)
    except FileNotFoundError:
        raise UserError(f"{where}: no such picture") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(f"{where}: over {Image.MAX_IMAGE_PIXELS:,} pixels; make the picture smaller first") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # Pillow's readers raise almost anything on broken files
        why = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"{where}: not a picture that can be read ({why})") from None


def open_image(source) -> Image.Image:
    """A PIL image as it is; a path or an open binary file is loaded."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (str, Path)) or hasattr(source, "read"):
        return load_image(source)
    raise UserError(f"an image must be a PIL image, a path or an open file, not {source!r:.80}")


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
    if image.mode == "F":                                                    # what was resized is a little over its top
        top = 1 if pixels.max() < 1.5 else 255 if pixels.max() < 300 else 65535
    else:
        top = 65535 if image.mode.startswith("I;16") or pixels.max() > 255 else 255
    return Image.fromarray((pixels.clip(0, top) * (255 / top)).round().astype(np.uint8))


def prepare_image(image: Image.Image, vision: VisionConfig) -> tuple[Tensor, tuple[int, int]]:
    """Patches (h * w, 3 * p * p) float32, row by row, each patch channel by channel; and the grid (h, w)."""
    pixels = np.array(_resize(to_rgb(image), vision))                        # (height, width, 3)
    p = vision.patch_size
    h, w = pixels.shape[0] // p, pixels.shape[1] // p
    x = torch.from_numpy(pixels[:h * p, :w * p]).float() / 255
    x = (x - torch.tensor(vision.image_mean)) / torch.tensor(vision.image_std)
    x = x.view(h, p, w, p, 3).permute(0, 2, 4, 1, 3)                         # (h, w, 3, p, p)
    return x.reshape(h * w, vision.patch_dim), (h, w)


def _resize(image: Image.Image, vision: VisionConfig) -> Image.Image:
    size = vision.image_size
    if vision.resize == "native":
        # Idefics2 was trained with bilinear resizing, the others with bicubic
        return image.resize(native_size(image.width, image.height, size, vision.min_image_size),
                            Image.Resampling.BILINEAR)
    if vision.resize == "pad" and image.width != image.height:
        side = max(image.size)
        if side ** 2 > 2 * Image.MAX_IMAGE_PIXELS:
            raise UserError(f"a picture of {image.width} x {image.height} pixels is too long to be padded to a square")
        square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in vision.image_mean))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return image.resize((size, size), Image.Resampling.BICUBIC)


def native_size(width: int, height: int, longest: int, shortest: int) -> tuple[int, int]:
    """(width, height) brought into the bounds, aspect kept where the bounds allow it (Idefics2's rounding)."""
    aspect = width / height
    if width >= height and width > longest:
        width, height = longest, int(longest / aspect)
    elif height > width and height > longest:
        width, height = int(longest * aspect), longest
    return max(width, shortest), max(height, shortest)
