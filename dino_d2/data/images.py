"""Reads image files: regular files of a few formats and of bounded size, as 8-bit RGB."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .findings import DataError

# Others start programs (EPS), unpack without bound (FITS) or are documents (PDF).
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs
_WEBP_COPIES = 3  # its decoder takes so many times as much memory as others
_STRIP = 256  # rows that are converted at a time
MAX_RATIO = 100  # of the sides: thinner images vanish when they are resized
_TURN = Image.Transpose
_EXIF_TURNS = {
    2: _TURN.FLIP_LEFT_RIGHT,
    3: _TURN.ROTATE_180,
    4: _TURN.FLIP_TOP_BOTTOM,
    5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270,
    7: _TURN.TRANSVERSE,
    8: _TURN.ROTATE_90,
}
_ORIENTATION = 0x0112  # EXIF tag
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_MIN_BRIGHTEST = 16  # of 255, of an image with 16 bits: the upper bits are in use
_ZERO_RUN = 64  # bytes: coded image data of a JPEG hardly ever has so many in a row


class ImageFacts(NamedTuple):
    """What the head of an image file says."""

    size: tuple[int, int]  # (width, height) after the EXIF turn
    stored: tuple[int, int]  # (width, height) in the file
    format: str
    mode: str  # Pillow's name
    orientation: int  # 1..8, EXIF's number; 1 is upright
    remarks: tuple[str, ...]  # reasons to convert, for the user


def resolve(root: str | os.PathLike, file_name: str) -> Path:
    """The path of an image below its folder.

    Raises:
        DataError: the name is a URL, or leads out of the folder.
    """
    if "://" in file_name:
        raise DataError("is a URL; download the file")
    if "\0" in file_name:
        raise DataError("holds a zero byte")
    top = os.path.abspath(root)
    path = os.path.abspath(os.path.join(top, file_name))
    if os.path.commonpath([top, path]) != top or path == top:
        raise DataError(f"leads out of the image folder {top}")
    return Path(path)


def forms_of(file_name: str) -> tuple[str, ...]:
    """The name, and what it means if Windows wrote it."""
    return (file_name, file_name.replace("\\", "/"))


def read_facts(path: str | os.PathLike) -> ImageFacts:
    """Read the head of an image file.

    Raises:
        DataError: see `read_image`; damage that only decoding shows is not found.
    """
    with _opened(path) as image:
        return _facts(image)


def read_image(path: str | os.PathLike) -> tuple[np.ndarray, ImageFacts]:
    """Decode an image file.

    Transparent parts become white, 16-bit values are brought to 8 bits, of an animation the first
    picture is taken, and the EXIF turn is applied. The facts' remarks say so.

    Returns:
        (h, w, 3) uint8 RGB, and the facts.

    Raises:
        DataError: no regular file; a format not in `FORMATS`; damaged or cut off; more pixels than
            `MAX_PIXELS`; too thin; 32-bit or floating-point values, or 16-bit ones that use 12 bits
            or fewer, whose range nobody knows.
    """
    with _opened(path) as image:
        deep, facts = _is_16_bit(image), _facts(image)  # in this order: EXIF data decodes a PNG
        if facts.format == "PNG":  # decoding does not look at its checksums
            with Image.open(path, formats=("PNG",)) as file:
                file.verify()
        shallow = _to_8_bits(image, deep)
        if facts.orientation in _EXIF_TURNS:
            shallow = shallow.transpose(_EXIF_TURNS[facts.orientation])
        return _to_array(shallow), facts


def looks_damaged(path: str | os.PathLike) -> bool:
    """Whether a JPEG has a hole of zeros in its coded data, which decoders pass over silently."""
    content = Path(path).read_bytes()
    start = content.find(b"\xff\xda")
    return content[:2] == b"\xff\xd8" and start > 0 and b"\0" * _ZERO_RUN in content[start:]


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """An image whose head has been read and found fit; what goes wrong later names the file too."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError("is no regular file")
        with Image.open(path, formats=FORMATS) as image:
            _check(image)
            yield image
    except FileNotFoundError as error:
        raise DataError(f"{path}: does not exist") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise DataError(f"{path}: {_wrong_kind(path)}") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: more pixels than {MAX_PIXELS}; cut it into tiles") from error
    except Exception as error:  # damaged files fail in many ways
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: damaged or cut off ({reason})") from error


def _wrong_kind(path: str | os.PathLike) -> str:
    if os.path.getsize(path) == 0:
        return "is empty"
    return f"is no image in one of the formats {', '.join(FORMATS)}"


def _check(image: Image.Image) -> None:
    width, height = image.size
    most = MAX_PIXELS // (_WEBP_COPIES if image.format == "WEBP" else 1)
    if width * height > most:
        raise DataError(f"{width} x {height} pixels are more than {most}; cut it into tiles")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise DataError(f"{width} x {height} pixels are too thin to be resized")
    if image.mode in ("I", "F"):
        raise DataError(
            f"holds {'32-bit' if image.mode == 'I' else 'floating-point'} values, whose range is "
            "not known; convert it to 8 bits"
        )


def _facts(image: Image.Image) -> ImageFacts:
    remarks = ["16-bit values brought to 8 bits"] if _is_16_bit(image) else []
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # of damaged EXIF data, which is not needed
        orientation = 1
        remarks.append("unreadable EXIF data ignored")
    if orientation not in range(1, 9):
        remarks.append("meaningless EXIF turn ignored")
        orientation = 1
    turned = image.size[::-1] if orientation >= 5 else image.size
    if orientation != 1:
        remarks.append("turned upright as EXIF says")
    if _has_alpha(image):
        remarks.append("transparent parts made white")
    if getattr(image, "is_animated", False) and image.format != "MPO":
        remarks.append("first picture of several taken")
    if image.mode not in ("RGB", "L", "1", *_SIXTEEN_BIT) and not _has_alpha(image):
        remarks.append(f"colours of mode {image.mode} turned into RGB")
    return ImageFacts(turned, image.size, image.format, image.mode, orientation, tuple(remarks))


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _is_16_bit(image: Image.Image) -> bool:
    """Also where Pillow gives 8 bits: what it unpacks from is in the tiles before decoding."""
    return image.mode in _SIXTEEN_BIT or ";16" in str(image.tile[:1])


def _to_8_bits(image: Image.Image, deep: bool) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        values = np.asarray(image)
        image = Image.fromarray((values // 257).astype(np.uint8))
    if deep and max(high for _, high in _extrema(image)) < _MIN_BRIGHTEST:
        raise DataError(
            "its 16-bit values use 12 bits or fewer: their range is not known; convert it to 8 bits"
        )
    return image


def _to_array(image: Image.Image) -> np.ndarray:
    """(h, w, 3) in RGB; strip by strip, for conversions copy what they convert several times."""
    image.load()
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height)))
        pixels[top : top + _STRIP] = np.asarray(_to_rgb(strip))
    return pixels


def _to_rgb(image: Image.Image) -> Image.Image:
    if _has_alpha(image):
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")


def _extrema(image: Image.Image) -> list[tuple[int, int]]:
    """(lowest, highest) value of every band but transparency."""
    found = image.getextrema()
    return [found] if len(image.getbands()) == 1 else list(found[: 3 if len(found) > 2 else 1])
