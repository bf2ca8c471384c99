from __future__ import annotations

import json
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, features

from emu_lightning.data.folder import Folder, decode, read_size
from emu_lightning.data.source import BrokenImage

RNG = np.random.default_rng(0)
RED = np.array([200, 30, 40])


def photo(width=24, height=16):
    ramp = np.linspace(0, 255, width * height).reshape(height, width)
    return Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], -1).round().astype(np.uint8))


def make(folder, **captions):
    for name, caption in captions.items():
        photo().save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)
    return folder


def show(path):
    return np.asarray(decode(path, path.name)).astype(int)


# --- captions -----------------------------------------------------------------------------------------------


def test_text_beside_the_image(tmp_path):
    make(tmp_path, b="a  bee\n", a="\ufeffan ant")
    (tmp_path / "deep").mkdir()
    photo().save(tmp_path / "deep" / "C.JPG")
    (tmp_path / "deep" / "C.TXT").write_text("a cat")
    (tmp_path / "._a.png").write_bytes(b"left by another system")
    folder = Folder(tmp_path)
    assert folder.uids() == ["a.png", "b.png", "deep/C.JPG"]
    assert [folder.text(i) for i in range(3)] == ["an ant", "a bee", "a cat"]
    sample = folder[0]
    assert (sample.uid, sample.text, sample.original_size) == ("a.png", "an ant", (16, 24))


def test_hugging_face_metadata(tmp_path):
    make(tmp_path, a="from the text file", b="a bee")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "an ant", "more": 1}\n\n')
    (tmp_path / "deep").mkdir()
    photo().save(tmp_path / "deep" / "c.webp" if features.check("webp") else tmp_path / "deep" / "c.png")
    name = "c.webp" if features.check("webp") else "c.png"
    (tmp_path / "deep" / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "ein Käfer"}))
    folder = Folder(tmp_path)
    assert dict(zip(folder.uids(), map(folder.text, range(3)), strict=True)) == {
        "a.png": "an ant",
        "b.png": "a bee",
        f"deep/{name}": "ein Käfer",
    }


@pytest.mark.parametrize(
    "line", ["{", '{"file_name": "a.png"}', '{"text": "x"}', "[]", '{"file_name": "a.png", "text": 3}']
)
def test_wrong_metadata_names_the_line(tmp_path, line):
    make(tmp_path, a="an ant")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line)
    with pytest.raises(ValueError, match="metadata.jsonl, line 2: expected"):
        Folder(tmp_path)


def test_metadata_of_a_missing_file_is_named(tmp_path):
    make(tmp_path, a="an ant")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}')
    with pytest.raises(ValueError, match="line 1: there is no file gone.png"):
        Folder(tmp_path)


@pytest.mark.parametrize("caption", [None, "", " \n"])
def test_missing_caption_names_file_and_remedy(tmp_path, caption):
    make(tmp_path, a="an ant")
    photo().save(tmp_path / "b.png")
    if caption is not None:
        (tmp_path / "b.txt").write_text(caption)
    with pytest.raises(
        ValueError, match=r"1 of 2 images .* such as b.png: write one into b.txt or into metadata.jsonl"
    ):
        Folder(tmp_path)


def test_undecodable_caption_is_named(tmp_path):
    make(tmp_path, a="x")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="a.txt is not UTF-8"):
        Folder(tmp_path)


def test_missing_or_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no images"):
        Folder(tmp_path)


# --- decoding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = np.asarray(photo()).astype(int)
    # How a camera stores an upright scene by orientation (EXIF 2.3, tag 274).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(np.ascontiguousarray(stored).astype(np.uint8)).save(path, exif=exif)
    assert (show(path) == upright).all()


def test_transparency_is_over_white(tmp_path):
    alpha = np.tile(np.array([0, 128, 255], np.uint8), (2, 1))
    colour = np.broadcast_to(RED, (2, 3, 3)).astype(np.uint8)
    expected = np.round(colour * (alpha / 255)[..., None] + 255 * (1 - alpha / 255)[..., None])
    Image.fromarray(np.dstack([colour, alpha])).save(tmp_path / "rgba.png")
    assert np.abs(show(tmp_path / "rgba.png") - expected).max() <= 1
    grey = np.full((2, 3), 40, np.uint8)
    Image.fromarray(np.dstack([grey, alpha]), "LA").save(tmp_path / "la.png")
    expected = np.round(40.0 * alpha / 255 + 255 * (1 - alpha / 255))
    assert np.abs(show(tmp_path / "la.png")[..., 0] - expected).max() <= 1


def test_palette_with_transparent_entry(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([*RED.tolist(), 10, 20, 30])
    image.save(tmp_path / "p.png", transparency=1)
    assert show(tmp_path / "p.png").tolist() == [[RED.tolist(), [255, 255, 255]]]
    image.save(tmp_path / "p.gif", transparency=0)
    assert show(tmp_path / "p.gif").tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_transparent_colour_of_rgb(tmp_path):
    pixels = np.array([[RED, [1, 2, 3]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert show(tmp_path / "rgb.png").tolist() == [[RED.tolist(), [255, 255, 255]]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_range(tmp_path, suffix):
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    path = tmp_path / f"grey.{suffix}"
    Image.fromarray(values).save(path)
    assert show(path)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_wide_grey_tiff(tmp_path, dtype):
    values = np.array([[0, 0.5, 1]]) * (65535 if dtype is np.int32 else 1)
    Image.fromarray(values.astype(dtype)).save(tmp_path / "grey.tif")
    assert np.abs(show(tmp_path / "grey.tif")[0, :, 1] - [0, 127.5, 255]).max() <= 0.5


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", "png"), ("L", "jpg"), ("P", "png"), ("CMYK", "jpg"), ("YCbCr", "jpg"), ("CMYK", "tif")],
)
def test_other_modes_look_the_same(tmp_path, mode, suffix):
    grey = mode in ("1", "L")
    image = Image.new("RGB", (16, 16), (255, 255, 255) if grey else tuple(RED))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    image.save(tmp_path / f"a.{suffix}", **({"quality": 100} if suffix == "jpg" else {}))
    assert np.abs(show(tmp_path / f"a.{suffix}") - (255 if grey else RED)).max() <= 4


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    for suffix in ("gif", "png"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
        assert (show(tmp_path / f"a.{suffix}") == [255, 0, 0]).all()


def bomb(path):
    """A PNG that claims 20000 x 20000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 20001))
        + chunk(b"IEND", b"")
    )


def damage(kind, path):
    photo(200, 200).save(path)
    data = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "without its last bytes":
        path.write_bytes(data[:-400])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "not an image":
        path.write_bytes(b"<html>404</html>")
    elif kind == "bomb":
        bomb(path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("kind", ["truncated", "without its last bytes", "empty", "not an image", "bomb"])
def test_broken_files_are_refused_by_name(tmp_path, monkeypatch, kind, suffix):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as another library may have set it
    damage(kind, tmp_path / f"a.{suffix}")
    with pytest.raises(BrokenImage, match=f"deep/a.{suffix}: ") as caught:
        decode(tmp_path / f"a.{suffix}", f"deep/a.{suffix}")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # data workers send it home


def test_a_missing_file_is_broken(tmp_path):
    with pytest.raises(BrokenImage, match="a.jpg"):
        decode(tmp_path / "a.jpg", "a.jpg")


# --- identity -----------------------------------------------------------------------------------------------


def test_fingerprint_follows_the_pixels_only(tmp_path):
    make(tmp_path, a="an ant", b="a bee")
    before = Folder(tmp_path).fingerprint()
    (tmp_path / "a.txt").write_text("another caption")
    assert Folder(tmp_path).fingerprint() == before
    photo(25).save(tmp_path / "a.png")
    assert Folder(tmp_path).fingerprint() != before


# --- sizes, and kinds that are not read ---------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_the_size_is_that_of_the_decoded_picture(tmp_path, orientation, suffix):
    exif = Image.Exif()
    if orientation is not None:
        exif[274] = orientation
    path = tmp_path / f"a.{suffix}"
    photo(24, 16).save(path, exif=exif)
    decoded = decode(path, "a")
    assert read_size(path, "a") == (decoded.height, decoded.width)


def test_the_size_of_a_broken_picture_is_an_error_by_name(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"<html>404</html>")
    with pytest.raises(BrokenImage, match="deep/a.jpg: "):
        read_size(tmp_path / "a.jpg", "deep/a.jpg")


def test_kinds_that_cannot_be_read_are_named_in_one_warning(tmp_path, recwarn):
    make(tmp_path, a="an ant")
    Folder(tmp_path)
    assert not recwarn.list
    for name in ("c.HEIC", "deep/d.avif", "a.dng", "b.heic", ".trash/x.heic"):  # a.dng lies beside a.png
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    Folder(tmp_path)
    (warning,) = recwarn.list
    assert "3 pictures in" in str(warning.message) and "such as b.heic: .avif, .heic cannot" in str(
        warning.message
    )
    assert "convert them to JPEG or PNG" in str(warning.message)


def test_a_folder_of_unread_kinds_says_so(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="such as a.heic"),
        pytest.raises(FileNotFoundError, match="no images"),
    ):
        Folder(tmp_path)
