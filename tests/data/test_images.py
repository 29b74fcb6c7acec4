"""Image files that are wrong, odd or hostile."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from figures import report
from PIL import Image

from dino_d2.data.findings import DataError
from dino_d2.data.images import looks_damaged, read_facts, read_image, resolve

RED = Image.new("RGB", (20, 10), (200, 10, 10))


def save(folder, picture, name="x.png", **options):
    picture.save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.bmp", "x.webp", "x.tiff", "x.gif", "x.ppm"])
def test_formats(tmp_path, name):
    pixels, facts = read_image(save(tmp_path, RED, name))
    assert pixels.shape == (10, 20, 3)
    assert pixels.dtype == np.uint8
    assert pixels.mean((0, 1)) == pytest.approx([200, 10, 10], abs=6)
    assert facts.size == (20, 10)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA"])
def test_modes_become_rgb(tmp_path, mode):
    name = "x.png" if mode not in ("CMYK", "YCbCr") else "x.tiff"
    source = RED.convert(mode)
    pixels, facts = read_image(save(tmp_path, source, name))
    assert pixels.mean((0, 1)) == pytest.approx(
        np.asarray(source.convert("RGB")).mean((0, 1)), abs=4
    )
    assert (facts.remarks == ()) == (mode in ("L", "1"))


def test_transparent_parts_become_white(tmp_path):
    picture = RED.convert("RGBA")
    picture.putpixel((0, 0), (0, 0, 0, 0))
    pixels, facts = read_image(save(tmp_path, picture))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == [200, 10, 10]
    assert facts.remarks == ("transparent parts made white",)


def test_16_bits_are_scaled(tmp_path):
    values = np.array([[0, 257, 65535]], np.uint16).repeat(3, 0)
    pixels, facts = read_image(save(tmp_path, Image.fromarray(values)))
    assert pixels[0, :, 0].tolist() == [0, 1, 255]
    assert facts.remarks == ("16-bit values brought to 8 bits",)


def png(width, height, depth, colour, rows):
    """The bytes of a PNG; rows: decompressed, each with its filter's byte."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b"")


def deep_png(path, value, colour):
    """Two pixels of 16 bits in each band: `value`, and if there is transparency, all opaque."""
    bands = {0: 1, 2: 3, 4: 1, 6: 3}[colour]
    pixel = struct.pack(">H", value) * bands + b"\xff\xff" * (colour > 2)
    path.write_bytes(png(2, 1, 16, colour, b"\0" + 2 * pixel))
    return path


@pytest.mark.parametrize("colour", [0, 2, 4, 6], ids=["L", "RGB", "LA", "RGBA"])
def test_16_bits_in_any_colours(tmp_path, colour):
    """Pillow turns three of these into 8 bits by itself."""
    pixels, facts = read_image(deep_png(tmp_path / "x.png", 0x8080, colour))
    assert pixels.tolist() == [[[128] * 3] * 2]
    assert "16-bit values brought to 8 bits" in facts.remarks
    with pytest.raises(DataError, match=r"x.png: its 16-bit values use 12 bits or fewer"):
        read_image(deep_png(tmp_path / "x.png", 0x0FFF, colour))


@pytest.mark.parametrize(
    ("dtype", "kind"), [(np.int32, "32-bit"), (np.float32, "floating-point")], ids=str
)
def test_32_bits_are_refused(tmp_path, dtype, kind):
    path = save(tmp_path, Image.fromarray(np.ones((4, 4), dtype)), "x.tiff")
    for read in (read_facts, read_image):
        with pytest.raises(DataError, match=f"x.tiff: holds {kind} values"):
            read(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns(tmp_path, orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = np.random.default_rng(0).integers(0, 256, (10, 20, 3), np.uint8)
    path = save(tmp_path, Image.fromarray(noise), exif=exif)
    pixels, facts = read_image(path)
    with Image.open(path) as file:
        np.testing.assert_array_equal(pixels, ImageOps.exif_transpose(file))
    assert facts.size == pixels.shape[1::-1]
    assert facts.stored == (20, 10)
    assert (facts.remarks != ()) == (orientation != 1)


@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff"], ids=str)
def test_broken_exif_is_no_obstacle(tmp_path, exif):
    assert read_image(save(tmp_path, RED, "x.jpg", exif=exif))[0].shape == (10, 20, 3)


def test_an_animation_gives_its_first_picture(tmp_path):
    path = save(tmp_path, RED, "x.gif", save_all=True, append_images=[RED.rotate(180), RED.copy()])
    Image.new("RGB", (20, 10), "blue")
    pixels, _ = read_image(path)
    assert pixels.mean((0, 1)) == pytest.approx([200, 10, 10], abs=6)


def test_several_pictures_are_told(tmp_path):
    blue = Image.new("RGB", (20, 10), "blue")
    path = save(tmp_path, RED, "x.tiff", save_all=True, append_images=[blue])
    pixels, facts = read_image(path)
    assert pixels[0, 0].tolist() == [200, 10, 10]
    assert facts.remarks == ("first picture of several taken",)


def encoded(format, **options):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        stream, format, **options
    )
    return stream.getvalue()


def bomb(width, height):
    """A PNG of many black pixels in few bytes."""
    return png(width, height, 8, 2, b"\0" * 1000)


UNFIT = {
    "empty": (b"", "is empty"),
    "a page": (b"<html>404</html>", "is no image in one of the formats JPEG"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image"),
    "pdf": (b"%PDF-1.4\n", "is no image"),
    "fits": (b"SIMPLE  =                    T".ljust(2880), "is no image"),
    "half a jpeg": (encoded("JPEG")[:2000], "damaged or cut off"),
    "half a png": (encoded("PNG")[:3000], "damaged or cut off"),
    "a png with a wrong byte": (
        encoded("PNG").replace(encoded("PNG")[500:504], b"\0\1\2\3"),
        "damaged or cut off",
    ),
    "a bomb": (bomb(13_000, 13_000), "13000 x 13000 pixels are more than"),
    "a great bomb": (bomb(30_000, 30_000), "more pixels than 89478485; cut"),
    "a hair": (bomb(1, 4000), "1 x 4000 pixels are too thin"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_files_are_named(tmp_path, case):
    content, message = UNFIT[case]
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.jpg: {message}"):
        read_image(tmp_path / "x.jpg")


MEASURE = """
import re, sys
from pathlib import Path
from dino_d2.data.images import read_image

def kibibytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = kibibytes("VmRSS")
read_image(sys.argv[1])
print(kibibytes("VmHWM") - before)
"""


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.parametrize(("name", "side"), [("x.png", 9400), ("x.gif", 9400), ("x.webp", 5400)])
def test_a_small_file_of_many_pixels_takes_little_memory(tmp_path, name, side):
    """Just below the limits, in a process of its own."""
    picture = Image.new("RGB" if name == "x.webp" else "1", (side, side))
    path = save(tmp_path, picture, name, lossless=True)
    assert path.stat().st_size < 1 << 17
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    )
    mebibytes = int(found.stdout) / 1024
    size = f"{side} x {side} pixels in {path.stat().st_size} bytes"
    report(f"MiB that an image takes at most, {size}", round(mebibytes))
    assert mebibytes < 512


def test_webp_images_may_have_fewer_pixels(tmp_path):
    path = save(tmp_path, Image.new("RGB", (5500, 5500)), "x.webp")
    with pytest.raises(DataError, match=r"5500 x 5500 pixels are more than 29826161"):
        read_facts(path)


def test_strips_make_a_whole(tmp_path):
    """Several strips, the last one shorter, turned and not."""
    values = np.random.default_rng(0).integers(0, 256, (600, 37, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(values)
    assert (read_image(save(tmp_path, picture))[0] == values).all()
    turned, _ = read_image(save(tmp_path, picture, exif=exif))
    assert (turned == np.rot90(values, -1)).all()


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for ever
    for name, message in (("pipe.jpg", "no regular"), ("", "no regular"), ("no", "does not exist")):
        with pytest.raises(DataError, match=message):
            read_image(tmp_path / name)


def test_a_hole_in_a_jpeg_is_seen(tmp_path):
    whole = encoded("JPEG", quality=95)
    (tmp_path / "whole.jpg").write_bytes(whole)
    (tmp_path / "hole.jpg").write_bytes(whole[:3000] + b"\0" * 200 + whole[3200:])
    read_image(tmp_path / "hole.jpg")  # Pillow does not mind
    assert looks_damaged(tmp_path / "hole.jpg")
    assert not looks_damaged(tmp_path / "whole.jpg")


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/passwd", "a/../../x", "", ".", "x\0.jpg"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"leads out|zero byte"):
        resolve(tmp_path, name)


@pytest.mark.parametrize("name", ["http://x.org/a.jpg", "s3://b/a.jpg", "file:///etc/passwd"])
def test_urls_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="is a URL"):
        resolve(tmp_path, name)


def test_names_within_the_folder(tmp_path):
    assert resolve(tmp_path, "a/../b.jpg") == tmp_path / "b.jpg"
    assert resolve(tmp_path, f"{tmp_path}/b.jpg") == tmp_path / "b.jpg"
