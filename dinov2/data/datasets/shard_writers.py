"""Writing shards of either kind to an open file, and the checksums to compare them by afterwards."""

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dinov2.data.datasets.tar_index import tar_members

ROWS_PER_GROUP = 32  # one image drawn at random costs the reading of its whole row group


class Sample(NamedTuple):
    """An image as it is stored, with what goes beside it."""

    name: str
    ending: str
    data: bytes
    source: str
    label: int | str | None


def write_tar(file: BinaryIO, samples: Iterator[Sample]) -> None:
    """Write samples as the webdataset library does: the image, and the label in a member ``cls``."""
    with tarfile.open(fileobj=file, mode="w") as archive:
        for sample in samples:
            _add(archive, f"{sample.name}.{sample.ending}", sample.data)
            if sample.label is not None:
                _add(archive, f"{sample.name}.cls", str(sample.label).encode())


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time and no owner: the same images make the same shard
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def tar_sums(path: str) -> list[int]:
    """Return the checksums of the images of a shard."""
    with Path(path).open("rb") as file:
        sums = []
        for member in tar_members(path):
            if not member.name.endswith(".cls"):
                file.seek(member.offset)
                sums.append(zlib.crc32(file.read(member.size)))
    return sums


def write_parquet(
    file: BinaryIO, samples: Iterator[Sample], classes: list[str] | None, group_rows: int = ROWS_PER_GROUP
) -> None:
    """Write samples in the layout of Hugging Face datasets, in small row groups.

    Args:
        file: to write to.
        samples: what to write; their labels are all numbers, all names or all None.
        classes: names of the class numbers, recorded with the file.
        group_rows: images per row group.
    """
    import pyarrow
    import pyarrow.parquet

    first = next(samples, None)
    text = first is not None and isinstance(first.label, str)
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    fields = [("image", image), ("label", pyarrow.string() if text else pyarrow.int64())]
    label = (
        {"_type": "ClassLabel", "names": classes}
        if classes
        else {"_type": "Value", "dtype": str(fields[1][1])}
    )
    features = {"image": {"_type": "Image"}, "label": label}
    schema = pyarrow.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    rows = [] if first is None else [first]
    # Images do not shrink further, and statistics over them would repeat their bytes.
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with pyarrow.parquet.ParquetWriter(file, schema, **options) as writer:
        for sample in samples:
            if len(rows) == group_rows:
                writer.write_table(_table(rows, schema))
                rows = []
            rows.append(sample)
        if rows:
            writer.write_table(_table(rows, schema))


def _table(rows: list[Sample], schema: Any) -> Any:
    import pyarrow

    images = [{"bytes": row.data, "path": row.source} for row in rows]
    return pyarrow.table({"image": images, "label": [row.label for row in rows]}, schema=schema)


def parquet_sums(path: str) -> list[int]:
    """Return the checksums of the images of a file."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        groups = (
            file.read_row_group(number, columns=["image.bytes"]).column(0)
            for number in range(file.num_row_groups)
        )
        return [zlib.crc32(row["bytes"].as_buffer()) for group in groups for row in group]
