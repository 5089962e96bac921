"""ADM's centre crop (Dhariwal & Nichol 2021, arXiv 2105.05233) of any encoded image.

What becomes of unusual images is what REPA's preprocessing makes of them, unless stated:

    EXIF orientation    ignored
    grey, 1-bit         three equal channels
    palette             its colours
    alpha               dropped: the stored colours stay, even where fully transparent
    CMYK                Pillow's conversion, without a colour profile
    16 bits             the high byte (upstream: so for colour, clipped at 255 for grey)
    several frames      the first
    smaller than R      enlarged

The content decides the format, never the name. Whatever does not decode whole is refused.
"""

import numpy as np

from repa_fast.data.images import decoding, expect_pixels, open_image, to_rgb

EXIF_ORIENTATION = 0x0112


def center_crop(data: bytes, resolution: int, name: str = "image") -> np.ndarray:
    """Decode an image to uint8 RGB (R, R, 3): halved while possible, resized, cropped.

    While the short side is at least 2R both sides are halved (rounding down) with a box filter; a
    bicubic filter then makes the short side R, the long one to the nearest pixel; the centre
    stays, an odd pixel more at the right or the bottom being cut.

    Raises:
        ValueError: no JPEG, PNG, WebP, BMP or GIF, damaged, or more than `MAX_PIXELS` as stored or
            as resized; says so of `name`.
    """
    from PIL.Image import Resampling

    image = to_rgb(open_image(data, name), name)
    while min(image.size) >= 2 * resolution:
        # not reduce(2): resize rounds to 8 bits after each direction, which upstream's images show
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    expect_pixels(f"{name}: of {image.width}x{image.height} pixels, resized", width, height)
    image = image.resize((width, height), Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return np.asarray(image)[top : top + resolution, left : left + resolution].copy()


def original(data: bytes, resolution: int, name: str = "image") -> bytes:
    """Return the untouched file, if it may stand in a dataset for its centre crop.

    It may if every reader makes the same R x R pixels of it: a JPEG or PNG of that size, grey or
    RGB with 8 bits, upright. `center_crop` then changes no pixel, and is what finds damage.

    Raises:
        ValueError: it may not; says why.
    """
    image = open_image(data, name)
    with decoding(name):
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    if image.size != (resolution, resolution):
        got, expected = f"is {image.width}x{image.height}", f"{resolution}x{resolution}"
    elif image.format not in ("JPEG", "PNG"):
        got, expected = f"is {image.format}", "JPEG or PNG"
    elif image.mode not in ("RGB", "L"):
        got, expected = f"has mode {image.mode}", "RGB or L"
    elif orientation != 1:
        got, expected = f"has EXIF orientation {orientation}", "1"
    else:
        return data
    raise ValueError(
        f"{name}: {got}, expected {expected} to keep the original file; encode as jpeg or png"
    )
