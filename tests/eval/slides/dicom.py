"""Writes a DICOM whole-slide image, one file per level, as far as OpenSlide needs it."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image

WSI_STORAGE = "1.2.840.10008.5.1.4.1.1.77.1.6"
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
ROOT = "1.2.826.0.1.3680043.8.498.7"
LONG = ("OB", "OW", "SQ", "UN", "UT")
SIDE = 256  # of a frame


def element(tag: int, vr: str, value) -> bytes:
    """Return an element in explicit little endian; texts, lists of numbers and nested bytes are values."""
    if isinstance(value, str):
        value = value.encode()
    elif isinstance(value, int):
        value = struct.pack({"US": "<H", "UL": "<I"}[vr], value)
    if len(value) % 2:
        value += b"\0" if vr in ("UI", "OB") else b" "
    length = struct.pack("<HI", 0, len(value)) if vr in LONG else struct.pack("<H", len(value))
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF) + vr.encode() + length + value


def item(value: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(value)) + value


def frames_of(level: np.ndarray) -> list[bytes]:
    height, width = level.shape[:2]
    padded = np.full((-(-height // SIDE) * SIDE, -(-width // SIDE) * SIDE, 3), 255, np.uint8)
    padded[:height, :width] = level
    frames = []
    for top in range(0, len(padded), SIDE):
        for left in range(0, padded.shape[1], SIDE):
            file = io.BytesIO()
            tile = padded[top : top + SIDE, left : left + SIDE]
            Image.fromarray(tile).save(file, "JPEG", quality=95, subsampling="4:2:2")
            frame = file.getvalue()
            frames.append(frame + b"\0" * (len(frame) % 2))
    return frames


def write_level(path: Path, level: np.ndarray, mpp: float, number: int, series: int = 101) -> None:
    frames = frames_of(level)
    uid = f"{ROOT}.{series}.{number + 1}"
    offsets = np.cumsum([0, *(8 + len(frame) for frame in frames[:-1])]).astype("<u4").tobytes()
    spacing = f"{mpp / 1000:.9f}\\{mpp / 1000:.9f}"
    measures = element(0x00280030, "DS", spacing)
    shared = element(0x00289110, "SQ", item(measures))
    kind = "ORIGINAL\\PRIMARY\\VOLUME\\" + ("RESAMPLED" if number else "NONE")
    data = b"".join(
        [
            element(0x00080008, "CS", kind),
            element(0x00080016, "UI", WSI_STORAGE),
            element(0x00080018, "UI", uid),
            element(0x00080060, "CS", "SM"),
            element(0x0020000D, "UI", f"{ROOT}.100"),
            element(0x0020000E, "UI", f"{ROOT}.{series}"),
            element(0x00200052, "UI", f"{ROOT}.102"),
            element(0x00209311, "CS", "TILED_FULL"),
            element(0x00280002, "US", 3),
            element(0x00280004, "CS", "YBR_FULL_422"),
            element(0x00280006, "US", 0),
            element(0x00280008, "IS", str(len(frames))),
            element(0x00280010, "US", SIDE),
            element(0x00280011, "US", SIDE),
            element(0x00280100, "US", 8),
            element(0x00280101, "US", 8),
            element(0x00280102, "US", 7),
            element(0x00280103, "US", 0),
            element(0x00480006, "UL", level.shape[1]),
            element(0x00480007, "UL", level.shape[0]),
            element(0x00480303, "UL", 1),
            element(0x52009229, "SQ", item(shared)),
            struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF),
            item(offsets),
            *(item(frame) for frame in frames),
            struct.pack("<HHI", 0xFFFE, 0xE0DD, 0),
        ]
    )
    meta = b"".join(
        [
            element(0x00020001, "OB", b"\0\1"),
            element(0x00020002, "UI", WSI_STORAGE),
            element(0x00020003, "UI", uid),
            element(0x00020010, "UI", JPEG_BASELINE),
            element(0x00020012, "UI", f"{ROOT}.9"),
        ]
    )
    path.write_bytes(b"\0" * 128 + b"DICM" + element(0x00020000, "UL", len(meta)) + meta + data)


def write_dicom(folder: Path, level0: np.ndarray, mpp: float, series: int = 101) -> Path:
    """Write level 0 and one of half its size; return the file of level 0."""
    folder.mkdir(parents=True)
    height, width = (side // 2 * 2 for side in level0.shape[:2])
    level0 = level0[:height, :width]
    half = level0.reshape(height // 2, 2, width // 2, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    write_level(folder / "level0.dcm", level0, mpp, 0, series)
    write_level(folder / "level1.dcm", half, 2 * mpp, 1, series)
    return folder / "level0.dcm"
