"""What becomes of damaged and unusual image files; docs/broken_input.md has the table."""

import io
import logging
import os
import pickle
import resource
import struct
import sys
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, ImageFile

from dinov2.data.datasets.decoders import MAX_PIXELS, DenseTargetDecoder, ImageDataDecoder
from dinov2.data.datasets.extended import ExtendedVisionDataset
from dinov2.data.datasets.tensor_decoder import TensorDecoder, to_tensor
from dinov2.errors import DataLoadingError, DatasetError, ImageReadError
from tests.conftest import REAL_DATA

SIDE = 128


@pytest.fixture(scope="module")
def tile():
    """A tile of real tissue."""
    with Image.open(REAL_DATA / "hgsc_nest.jpg") as picture:
        return picture.crop((100, 700, 100 + SIDE, 700 + SIDE)).convert("RGB")


def encode(image, fmt, **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def tiff(values, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def decode(data):
    image = ImageDataDecoder(data).decode()
    assert image.mode == "RGB"
    assert torch.equal(TensorDecoder(data).decode(), to_tensor(image))
    return np.asarray(image).astype(int)


def refusal(data):
    texts = []
    for decoder in (ImageDataDecoder, TensorDecoder):
        with pytest.raises(ImageReadError) as caught:
            decoder(data).decode()
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert texts[0]
    assert "\n" not in texts[0]
    return texts[0]


def plain_decode(data):
    """As the forks do it."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


FORMATS = {
    "jpeg": ("JPEG", {"quality": 90}),
    "jpeg 444": ("JPEG", {"quality": 100, "subsampling": 0}),
    "progressive": ("JPEG", {"progressive": True}),
    "restarts": ("JPEG", {"restart_marker_blocks": 2}),
    "png": ("PNG", {}),
    "tiff": ("TIFF", {}),
    "tiff lzw": ("TIFF", {"compression": "tiff_lzw"}),
    "webp": ("WEBP", {}),
    "bmp": ("BMP", {}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_plain_pictures_are_decoded_as_ever(tile, name):
    data = encode(tile, FORMATS[name][0], **FORMATS[name][1])
    got, expected = ImageDataDecoder(data).decode(), plain_decode(data)
    assert (got.mode, got.size) == (expected.mode, expected.size)
    assert got.tobytes() == expected.tobytes()
    assert (decode(data) == np.asarray(expected)).all()  # by both decoders


@pytest.mark.parametrize(
    ("name", "grey", "by_pil"),
    [("jpeg", False, False), ("progressive", False, False), ("jpeg", True, True), ("png", False, True)],
)
def test_ordinary_jpegs_alone_go_round_pil(tile, name, grey, by_pil, monkeypatch):
    """A last pixel in the colour of missing data calls for PIL's closer look."""
    asked = []
    monkeypatch.setattr(ImageDataDecoder, "decode", lambda self: asked.append(self) or tile)
    picture = Image.new("RGB", tile.size, (128, 128, 128)) if grey else tile
    TensorDecoder(encode(picture, FORMATS[name][0], **FORMATS[name][1])).decode()
    assert bool(asked) == by_pil


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.1, 0.35, 0.6, 0.9, 0.99, -1, -2, -10])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on the cut directories of TIFF files
def test_a_cut_file_is_refused_or_complete_never_half_a_picture(tile, name, share):
    data = encode(tile, FORMATS[name][0], **FORMATS[name][1])
    cut = data[: int(len(data) * share)] if share >= 0 else data[:share]
    if name == "png" and share < 0:  # nothing but the closing mark is missing
        assert (decode(cut) == decode(data)).all()
    else:
        refusal(cut)


@pytest.mark.parametrize("name", ["jpeg", "jpeg 444", "progressive", "restarts"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.97, 0.99])
def test_a_jpeg_whose_tail_was_lost_to_zeros_is_refused(tile, name, share):
    """So a crash leaves files that had been given their length but not their content."""
    data = encode(tile, FORMATS[name][0], **FORMATS[name][1])
    length = int(len(data) * share)
    refusal(data[:length] + bytes(len(data) - length))


@pytest.mark.parametrize("name", ["jpeg", "jpeg 444", "restarts"])
@pytest.mark.parametrize("share", [0.2, 0.3, 0.6, 0.9, 0.97])
def test_a_cut_jpeg_with_an_end_mark_is_refused(tile, name, share):
    """libjpeg fills the rest with grey, without an error."""
    data = encode(tile, FORMATS[name][0], **FORMATS[name][1])
    cut = data[: int(len(data) * share)] + b"\xff\xd9"
    assert plain_decode(cut).getpixel((SIDE - 1, SIDE - 1)) == (128, 128, 128)
    assert "end before the picture does" in refusal(cut)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_grey_picture_is_no_cut_one(mode, progressive):
    grey = Image.new(mode, (SIDE, SIDE), 128 if mode == "L" else (128, 128, 128))
    assert (decode(encode(grey, "JPEG", progressive=progressive)) == 128).all()


def test_what_follows_a_jpeg_is_ignored(tile):
    data = encode(tile, "JPEG")
    for tail in (bytes(1000), b"a trailer of some scanner"):
        assert (decode(data + tail) == decode(data)).all()


def test_cut_files_stay_errors_whatever_other_libraries_tell_pillow(tile, caplog, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for fmt in ("JPEG", "PNG", "TIFF"):
        data = encode(tile, fmt)
        with caplog.at_level(logging.WARNING, logger="dinov2"):
            refusal(data[: len(data) // 2])
    assert caplog.text.count("LOAD_TRUNCATED_IMAGES is turned off") == 1


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "an empty file (0 bytes)"),
        (b"\xff", "no image of a known format"),
        (b"<html>404 not found</html>" * 20, "no image of a known format"),
        (bytes(10_000), "no image of a known format"),
        (zlib.compress(b"slide") * 50, "no image of a known format"),
    ],
)
def test_what_is_no_image_is_said_so(data, words):
    assert words in refusal(data)


def test_a_damaged_png_chunk_is_refused(tile):
    data = bytearray(encode(tile, "PNG"))
    data[len(data) // 2] ^= 0xFF
    assert "damaged" in refusal(bytes(data))


def inks():
    """CMYK patches of 16 px, on which JPEG at the highest quality is exact to a few levels."""
    rng = np.random.default_rng(0)
    return np.kron(rng.integers(0, 256, (4, 4, 4)), np.ones((16, 16, 1))).astype(np.uint8)


def printed(cmyk):
    """The plain conversion, in floating point."""
    ink = cmyk.astype(float)
    return (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255


def without_adobe_marker(data):
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


def test_cmyk_jpegs_have_the_right_colours_inverted_or_not():
    stored_inverted = imagecodecs.jpeg8_encode(
        255 - inks(), level=100, colorspace="CMYK", outcolorspace="CMYK"
    )
    assert b"Adobe" in stored_inverted
    assert np.abs(decode(stored_inverted) - printed(inks())).max() <= 2
    as_pillow_writes = encode(Image.fromarray(inks(), "CMYK"), "JPEG", quality=100, subsampling=0)
    assert np.abs(decode(as_pillow_writes) - printed(inks())).max() <= 2
    # Without Adobe's mark the inks are stored as they are.
    plain = without_adobe_marker(
        imagecodecs.jpeg8_encode(inks(), level=100, colorspace="CMYK", outcolorspace="CMYK")
    )
    assert np.abs(imagecodecs.jpeg8_decode(plain).astype(int) - inks()).max() <= 1
    assert np.abs(decode(plain) - printed(inks())).max() <= 2


def test_ycck_jpegs_have_the_right_colours():
    data = imagecodecs.jpeg8_encode(255 - inks(), level=100, colorspace="CMYK", outcolorspace="YCCK")
    stored = imagecodecs.jpeg8_decode(data, colorspace="YCCK", outcolorspace="CMYK")
    # YCCK is rounded and subsampled; the independent decoder sees the same inks.
    inside = (slice(4, -4), slice(4, -4))
    assert np.abs(decode(data) - printed(255 - stored))[inside].mean() < 1.5


def test_cmyk_tiffs_have_the_right_colours():
    data = tiff(inks(), photometric="separated")
    assert np.abs(decode(data) - printed(inks())).max() <= 1


def ramp(top):
    return np.linspace(0, top, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)


@pytest.mark.parametrize(
    "write",
    [
        imagecodecs.png_encode,
        lambda values: tiff(values, photometric="minisblack"),
        lambda values: tiff(values, photometric="minisblack", byteorder=">"),
        lambda values: tiff(values, photometric="minisblack", compression="zlib"),
        lambda values: tiff(65535 - values, photometric="miniswhite"),
        lambda values: tiff(np.stack([values, values], -1)[..., 0], photometric="minisblack", rowsperstrip=7),
    ],
    ids=["png", "tiff", "big endian", "deflate", "white is 0", "strips"],
)
def test_16_bit_grey_is_scaled(write):
    got = decode(write(ramp(65535)))
    assert (got == (ramp(65535) >> 8)[..., None]).all()
    assert got[..., 0].max() == 255
    assert len(np.unique(got)) == 256


@pytest.mark.parametrize(
    "write",
    [
        imagecodecs.png_encode,
        lambda values: tiff(values, photometric="rgb"),
        lambda values: tiff(values, photometric="rgb", byteorder=">"),
        lambda values: tiff(values, photometric="rgb", compression="zlib", predictor=True),
    ],
    ids=["png", "tiff", "big endian", "deflate"],
)
def test_16_bit_rgb_is_scaled(write):
    values = np.stack([ramp(65535), ramp(65535)[::-1], ramp(65535).T], -1)
    assert (decode(write(values)) == values >> 8).all()


@pytest.mark.parametrize("bits", [np.uint8, np.uint16])
def test_tiffs_with_a_plane_per_colour_are_right_or_refused(bits):
    values = np.stack([ramp(65535), ramp(65535)[::-1], ramp(65535).T])
    values = (values >> 8).astype(np.uint8) if bits is np.uint8 else values
    data = tiff(values, photometric="rgb", planarconfig="separate")
    if bits is np.uint8:
        assert (decode(data) == values.transpose(1, 2, 0)).all()
    else:
        assert "16-bit TIFF with one plane per colour" in refusal(data)


@pytest.mark.parametrize(("kind", "word"), [(np.float32, "floating-point"), (np.int32, "32-bit")])
def test_pixels_without_a_defined_range_are_refused(kind, word):
    assert word in refusal(tiff(ramp(255).astype(kind)))


def transparent(tile):
    alpha = np.tile(np.linspace(0, 255, SIDE).astype(np.uint8), (SIDE, 1))
    return np.dstack([np.asarray(tile), alpha])


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP"])
def test_transparent_pixels_are_laid_over_white(tile, fmt):
    rgba = transparent(tile)
    data = encode(Image.fromarray(rgba), fmt, **({"lossless": True, "exact": True} if fmt == "WEBP" else {}))
    share = rgba[..., 3:] / 255
    expected = rgba[..., :3] * share + 255 * (1 - share)
    got = decode(data)
    assert np.abs(got - expected).max() <= 1
    assert (got[:, 0] == 255).all()
    assert (got[:, -1] == rgba[:, -1, :3]).all()


def test_opaque_alpha_changes_nothing(tile):
    assert (decode(encode(tile.convert("RGBA"), "PNG")) == np.asarray(tile)).all()


def test_transparent_grey_and_palettes_are_laid_over_white(tile):
    grey = Image.fromarray(transparent(tile)).convert("LA")
    values = np.asarray(grey).astype(float)
    expected = values[..., :1] * values[..., 1:] / 255 + 255 - values[..., 1:]
    assert np.abs(decode(encode(grey, "PNG")) - expected).max() <= 1

    palette = Image.new("P", (4, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2, 1])
    for fmt in ("PNG", "GIF"):
        got = decode(encode(palette, fmt, transparency=1))
        assert got[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90], [255, 255, 255]]

    keyed = Image.fromarray(np.uint8([[[1, 2, 3], [4, 5, 6]]]))
    assert decode(encode(keyed, "PNG", transparency=(4, 5, 6)))[0].tolist() == [[1, 2, 3], [255, 255, 255]]


def test_grey_and_bilevel_pictures_have_three_equal_channels(tile):
    grey = tile.convert("L")
    for fmt in ("PNG", "TIFF", "JPEG"):
        got = decode(encode(grey, fmt, **({"quality": 100} if fmt == "JPEG" else {})))
        assert (got == got[..., :1]).all()
        assert np.abs(got[..., 0] - np.asarray(grey).astype(int)).max() <= 2
    bilevel = tile.convert("1")
    for fmt in ("PNG", "TIFF"):
        assert (decode(encode(bilevel, fmt))[..., 0] == 255 * np.asarray(bilevel)).all()


def test_exif_orientation_is_ignored(tile):
    upright = encode(tile.crop((0, 0, 100, 50)), "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = encode(tile.crop((0, 0, 100, 50)), "JPEG", exif=exif)
    assert b"Exif" in turned
    assert decode(turned).shape == (50, 100, 3)
    assert (decode(turned) == decode(upright)).all()


def test_icc_profiles_are_ignored(tile):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    assert (decode(encode(tile, "JPEG", icc_profile=profile)) == decode(encode(tile, "JPEG"))).all()


@pytest.mark.parametrize("fmt", ["TIFF", "GIF", "WEBP", "PNG"])
def test_of_several_pages_or_frames_the_first_counts(fmt):
    pages = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if fmt == "WEBP" else {}
    got = decode(encode(pages[0], fmt, save_all=True, append_images=pages[1:], **options))
    assert got.shape == (10, 20, 3)
    assert (got == [255, 0, 0]).all()


def peak_mib():
    """The most memory this process has held since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
@pytest.mark.parametrize("pillow_limit", [Image.MAX_IMAGE_PIXELS, None])
def test_a_huge_picture_is_refused_before_it_takes_memory(pillow_limit, monkeypatch):
    """A real bilevel TIFF of 20,000 x 20,000 px, 50 MB as a file, would be 1.2 GB as RGB."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    data = encode(Image.new("1", (20_000, 20_000)), "TIFF")
    reset_peak()
    before = peak_mib()
    message = refusal(data)
    assert "more than 89,478,485 pixels: cut it into tiles first" in message
    assert ("400000000" if pillow_limit else "20000 x 20000 pixels") in message
    # Pillow's reader takes a copy of the bytes.
    assert peak_mib() - before < len(data) / 2**20 + 8


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_of_pixels():
    assert "10000 x 10000 pixels are more than 89,478,485" in refusal(png_header(10_000, 10_000))
    inside = Image.new("L", (9459, 9459))
    assert inside.width * inside.height <= MAX_PIXELS
    assert ImageDataDecoder(encode(inside.convert("1"), "PNG")).decode().size == (9459, 9459)


def test_label_maps_keep_their_values_and_fail_alike(tile):
    labels = np.uint8([[3, 200], [0, 1]])
    assert (np.asarray(DenseTargetDecoder(encode(Image.fromarray(labels), "PNG")).decode()) == labels).all()
    for data in (b"", encode(tile, "PNG")[:2000]):
        with pytest.raises(ImageReadError):
            DenseTargetDecoder(data).decode()


class Files(ExtendedVisionDataset):
    """Files by their paths; the error of `fails`, if any, instead."""

    def __init__(self, paths, fails=None):
        super().__init__("")
        self.paths, self.fails = paths, fails

    def get_image_path(self, index):
        return str(self.paths[index])

    def get_image_data(self, index):
        if self.fails is not None:
            raise self.fails
        return self.paths[index].read_bytes()

    def get_target(self, index):
        return None

    def __len__(self):
        return len(self.paths)


def error_of(dataset, kind=ImageReadError):
    with pytest.raises(RuntimeError) as caught:
        dataset[0]
    assert type(caught.value) is kind
    return caught.value


def test_missing_files_folders_and_closed_files(tmp_path, tile):
    gone = tmp_path / "gone.png"
    gone.write_bytes(encode(tile, "PNG"))
    dataset = Files([gone])
    assert dataset[0][0].size == (SIDE, SIDE)
    gone.unlink()
    error = error_of(dataset)
    assert str(error) == (
        f"can not read image for sample 0 ({gone}): no such file or directory; "
        "mend it, or leave it out of the dataset"
    )
    assert (error.path, error.reason) == (str(gone), "no such file or directory")
    assert isinstance(error.__cause__, FileNotFoundError)
    assert error_of(Files([tmp_path])).reason == "is a directory"


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up root's rights to meet a closed file")
def test_a_file_that_may_not_be_read(tmp_path, tile):
    closed = tmp_path / "closed.png"
    closed.write_bytes(encode(tile, "PNG"))
    closed.chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    os.seteuid(65534)
    try:
        error = error_of(Files([closed]))
    finally:
        os.seteuid(0)
    assert error.reason == "permission denied"


@pytest.mark.parametrize(
    ("cause", "kind", "words"),
    [
        (TypeError("of the program"), RuntimeError, "TypeError: of the program"),
        (NotImplementedError(), RuntimeError, "NotImplementedError"),
        (ZeroDivisionError("by zero"), RuntimeError, "ZeroDivisionError"),
        (MemoryError(), DataLoadingError, "memory has run out"),
        (OSError(24, "Too many open files"), DataLoadingError, "ulimit -n"),
        (ValueError("cannot mmap an empty file"), ImageReadError, "cannot mmap an empty file"),
        (OSError(5, "input/output error"), ImageReadError, "input/output error"),
        (zlib.error("incorrect data check"), ImageReadError, "incorrect data check"),
    ],
)
def test_only_errors_of_the_data_blame_the_image(tmp_path, cause, kind, words):
    error = error_of(Files([tmp_path / "a.png"], fails=cause), kind)
    assert words in str(error)
    assert str(error).startswith(f"can not read image for sample 0 ({tmp_path / 'a.png'}): ")


def test_errors_of_the_index_and_the_keyboard_pass_as_they_are(tmp_path):
    with pytest.raises(DatasetError, match="^the index is missing$") as caught:
        Files([tmp_path], fails=DatasetError("the index is missing"))[0]
    assert type(caught.value) is DatasetError
    with pytest.raises(KeyboardInterrupt):
        Files([tmp_path], fails=KeyboardInterrupt())[0]


def test_too_many_open_files_do_not_blame_the_image(tmp_path, tile):
    path = tmp_path / "a.png"
    path.write_bytes(encode(tile, "PNG"))
    dataset = Files([path])
    assert dataset[0]  # everything that Pillow opens at first use is open
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        error = error_of(dataset, DataLoadingError)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "ulimit -n" in str(error)


def test_the_error_survives_pickling_and_takes_a_place_of_its_own():
    error = ImageReadError("whole sentence", path="slide.svs at (512, 1024)", reason="bad strip")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.path, again.reason) == ("whole sentence", error.path, error.reason)
    assert ImageReadError("only a sentence").reason == "only a sentence"
    told = error_of(Files(["/data/other"], fails=error))
    assert str(told) == (
        "can not read image for sample 0 (slide.svs at (512, 1024)): bad strip; mend it, or leave it out of "
        "the dataset"
    )
    assert told.path == error.path


@pytest.mark.parametrize("name", ["jpeg", "jpeg 444", "progressive", "restarts"])
def test_a_decoded_jpeg_may_be_pickled_changed_and_read_again(tile, name):
    """It is handed on without a copy, so it has to stand for one."""
    fmt, options = FORMATS[name]
    data = encode(tile, fmt, **options)
    wanted = np.asarray(plain_decode(data))
    decoded = ImageDataDecoder(data).decode()
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(decoded))), wanted)
    decoded.load()
    decoded.paste("black", (0, 0, SIDE, 10))
    assert np.array_equal(np.asarray(decoded.crop((0, 10, SIDE, SIDE))), wanted[10:])
    assert np.array_equal(decode(data), wanted)
