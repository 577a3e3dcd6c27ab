import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from unifusion_core.conditioning.vlm import tiling

RED = (200, 30, 40)


def gradient(width, height):
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("tile", [64, 448])
@pytest.mark.parametrize("max_tiles", [1, 4, 9, 12])
def test_grid_is_the_one_transformers_chooses(tile, max_tiles):
    reference = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    sides = [8, 63, 64, 65, 100, 224, 300, 448, 512, 640, 768, 900, 1024, 1344, 2048, 4000]
    for width in sides:
        for height in sides:
            cols, rows = reference.get_optimal_tiled_canvas((height, width), (tile, tile), 1, max_tiles)
            assert tiling.choose_grid(width, height, tile, max_tiles) == (rows, cols), (width, height)


def test_tile_pixels_equal_those_of_transformers():
    reference = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
    image = gradient(200, 130)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    processor = reference.GotOcr2ImageProcessorPil(
        size={"height": 64, "width": 64}, crop_to_patches=True, max_patches=9, image_mean=mean, image_std=std
    )
    theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"])
    tiles = tiling.split(image, tiling.choose_grid(200, 130, 64, 9), 64)
    ours = np.stack([tiling.to_array(tile, mean, std) for tile in tiles])
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 1e-5


def test_known_grids_of_the_paper_resolutions():
    assert tiling.choose_grid(1024, 1024, 448, 9) == (3, 3)
    assert tiling.choose_grid(1024, 768, 448, 9) == (2, 3)
    assert tiling.choose_grid(512, 512, 448, 9) == (1, 1)


def test_tiles_are_row_major_and_the_thumbnail_is_last():
    image = Image.new("RGB", (120, 80))
    colours = [(40 * i, 10, 10) for i in range(6)]
    for i, colour in enumerate(colours):
        image.paste(colour, (i % 3 * 40, i // 3 * 40, i % 3 * 40 + 40, i // 3 * 40 + 40))
    *tiles, thumbnail = tiling.split(image, (2, 3), 40)
    assert [tile.getpixel((20, 20)) for tile in tiles] == colours
    assert thumbnail.size == (40, 40) and thumbnail.getpixel((5, 5)) == colours[0]


def test_a_single_tile_has_no_thumbnail():
    assert len(tiling.split(gradient(50, 50), (1, 1), 64)) == 1


def test_token_positions_are_centres_in_the_source_image():
    positions = tiling.token_positions((2, 3), 4)
    assert positions.shape == ((2 * 3 + 1) * 16, 3) and (positions[:, 0] == 1).all()
    assert positions[0, 1:] == pytest.approx((0.125 / 2, 0.125 / 3))
    assert positions[5 * 16 + 15, 1:] == pytest.approx((1 - 0.125 / 2, 1 - 0.125 / 3))
    assert positions[16, 1:] == pytest.approx((0.125 / 2, 1 / 3 + 0.125 / 3))  # second tile stands right of the first
    assert positions[-16:, 1:].mean(0) == pytest.approx((0.5, 0.5))
    assert positions[-1, 1:] == pytest.approx((0.875, 0.875))


def test_one_tile_positions_are_a_plain_grid():
    assert tiling.token_positions((1, 1), 16).shape == (256, 3)
    assert tiling.token_positions((1, 1), 2)[:, 1:].tolist() == [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]


@pytest.mark.parametrize("grid", [(0, 2), (2, 2.5), (1, 2, 3), (-1, 1)])
def test_bad_grids_are_refused(grid):
    with pytest.raises(ValueError, match="grid .*at least 1"):
        tiling.check_grid(grid)


def near(pixel, colour):
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= 3


def test_every_common_kind_of_file_loads_as_rgb(tmp_path):
    plain = Image.new("RGB", (20, 12), RED)
    grey16 = Image.fromarray(np.full((12, 20), 128 * 257, np.uint16))
    files = {
        "rgb.png": (plain, RED),
        "palette.png": (plain.quantize(4), RED),
        "cmyk.jpg": (plain.convert("CMYK"), RED),
        "grey.png": (Image.new("L", (20, 12), 77), (77, 77, 77)),
        "grey16.png": (grey16, (128, 128, 128)),
        "grey16.tif": (grey16, (128, 128, 128)),
        "bits.png": (Image.new("1", (20, 12), 1), (255, 255, 255)),
        "clear.png": (Image.new("RGBA", (20, 12), (*RED, 0)), (255, 255, 255)),
        "half.png": (Image.new("RGBA", (20, 12), (0, 0, 0, 128)), (127, 127, 127)),
        "grey_alpha.png": (Image.new("LA", (20, 12), (0, 0)), (255, 255, 255)),
        "still.gif": (plain, RED),
        "lossless.webp": (plain, RED),
    }
    for name, (image, colour) in files.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        loaded = tiling.load_image(tmp_path / name)
        assert loaded.mode == "RGB" and loaded.size == (20, 12), name
        assert near(loaded.getpixel((10, 6)), colour), (name, loaded.getpixel((10, 6)))


def test_palette_transparency_is_laid_over_white(tmp_path):
    image = Image.new("P", (10, 10), 0)
    image.putpalette([*RED, 0, 0, 255])
    image.putpixel((5, 5), 1)
    image.save(tmp_path / "p.png", transparency=0)
    loaded = tiling.load_image(tmp_path / "p.png")
    assert loaded.getpixel((0, 0)) == (255, 255, 255) and loaded.getpixel((5, 5)) == (0, 0, 255)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (30, 16), RED)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert tiling.load_image(tmp_path / "turned.jpg").size == (16, 30)


def refuses(path, match):
    with pytest.raises(ValueError, match=match) as caught:
        tiling.load_image(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_picture_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    gradient(300, 200).save(tmp_path / "whole.png")
    gradient(300, 200).save(tmp_path / "whole.jpg")
    refuses(tmp_path / "text.png", "not an image")
    refuses(tmp_path / "empty.jpg", "not an image")
    refuses(tmp_path / "absent.png", "no such image file")
    refuses(tmp_path, "no such image file")
    for name in ("whole.png", "whole.jpg"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"cut_{name}").write_bytes(data[: len(data) // 2])
        refuses(tmp_path / f"cut_{name}", "damaged")


def test_sizes_outside_the_limits_are_refused(tmp_path):
    for size in [(1, 1), (7, 100), (8000, 6300), (16400, 10)]:
        Image.new("1", size).save(tmp_path / "size.png")
        refuses(
            tmp_path / "size.png", rf"{size[0]}x{size[1]} px; accepted are sides of 8 to 16384 px and at most 50 mega"
        )
    Image.new("1", (8, 8)).save(tmp_path / "bomb.png")
    data = bytearray((tmp_path / "bomb.png").read_bytes())
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "bomb.png").write_bytes(data)
    refuses(tmp_path / "bomb.png", "50 megapixels")
    with pytest.raises(ValueError, match="0x5 px"):
        tiling.as_rgb(Image.new("RGB", (0, 5)))


def test_float_images_are_refused():
    with pytest.raises(ValueError, match="32-bit float"):
        tiling.as_rgb(Image.new("F", (10, 10)))
