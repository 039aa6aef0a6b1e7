"""Packs the images of any dataset into shards, byte for byte, for file systems that are slow at small files.

    python scripts/pack_shards.py --dataset 'Pathology:split=TRAIN:root=...:extra=...' --output DIR \
        --format webdataset --shard-size 10000 --processes 8

Each shard is written aside, read back and compared, and only then takes its name; shards that are there are
not written again, so an interrupted run goes on where it was. docs/shards_and_mixtures.md tells what
to choose.
"""

import argparse
import io
import json
import logging
import multiprocessing
import re
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from dinov2 import cli
from dinov2.data import make_dataset
from dinov2.data.dataset_string import format_dataset_string
from dinov2.data.datasets.arrays import atomic_file
from dinov2.data.datasets.mixture import MixtureDataset
from dinov2.data.datasets.path_map import PathMap
from dinov2.data.datasets.shard_writers import Sample, parquet_sums, tar_sums, write_parquet, write_tar
from dinov2.errors import ConfigError, DatasetError, OutputError

logger = logging.getLogger("dinov2")

ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "TIFF": "tif", "WEBP": "webp", "BMP": "bmp"}
PROGRESS_SECONDS = 20.0
PLAN, SKIPPED = "pack.json", "skipped.tsv"


@dataclass(frozen=True)
class Plan:
    """What a folder of shards consists of; an interrupted run may only go on with the same one."""

    dataset: str
    format: str
    shard_size: int
    images: int
    classes: list[str] | None

    def shard_path(self, output: Path, number: int) -> Path:
        """Return the path of a shard."""
        return output / f"shard-{number:06d}.{'tar' if self.format == 'webdataset' else 'parquet'}"

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_size)


class Packer:
    """Writes single shards; one copy per process.

    Args:
        dataset: what to pack.
        plan: how.
        output: folder of the shards.
        skip_broken: leave out what is no image, and record it, instead of stopping.
    """

    def __init__(self, dataset: Any, plan: Plan, output: Path, skip_broken: bool) -> None:
        self.dataset, self.plan, self.output, self.skip_broken = dataset, plan, output, skip_broken

    def write(self, number: int) -> int:
        """Write a shard; return how many images it has.

        Raises:
            DatasetError: an image can not be read.
            OutputError: the shard can not be written, or reads differently afterwards.
        """
        path = self.plan.shard_path(self.output, number)
        begin = number * self.plan.shard_size
        indices = range(begin, min(begin + self.plan.shard_size, self.plan.images))
        tar = self.plan.format == "webdataset"
        with atomic_file(str(path)) as file:
            sums: list[int] = []
            samples = self._samples(indices, sums)
            write_tar(file, samples) if tar else write_parquet(file, samples, self.plan.classes)
            file.flush()
            read = tar_sums(file.name) if tar else parquet_sums(file.name)
            if read != sums:
                raise OutputError(
                    f'"{path}" reads differently from what was written: check the disk, run again'
                )
        return len(sums)

    def _samples(self, indices: range, sums: list[int]) -> Iterator[Sample]:
        for index in indices:
            try:
                sample = self._sample(index)
            except (OSError, DatasetError) as error:
                if not self.skip_broken:
                    raise DatasetError(
                        f"can not pack image {index} ({error}): mend it, or add --skip-broken to leave out "
                        "such images"
                    ) from error
                with (self.output / SKIPPED).open("a", encoding="utf-8") as file:
                    file.write(f"{index}\t{' '.join(str(error).split())}\n")
                continue
            sums.append(zlib.crc32(sample.data))
            yield sample

    def _sample(self, index: int) -> Sample:
        data, source = self.dataset.get_image_data(index), self.dataset.get_image_path(index)
        try:
            with Image.open(io.BytesIO(data)) as image:
                ending = ENDINGS.get(image.format)
        except UnidentifiedImageError:
            ending = None
        if ending is None:
            raise DatasetError(f'"{source}" is no image of a format that shards take, {", ".join(ENDINGS)}')
        # The first dot of a name ends the key in tar shards.
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(source).stem)[-60:]
        label = self.dataset.get_target(index)
        return Sample(f"{index:09d}_{stem}", ending, data, source, label if label is None else _plain(label))


def _plain(label: Any) -> int | str:
    return label if isinstance(label, str) else int(label)


def pack(
    dataset_str: str,
    output: str,
    *,
    kind: str,
    shard_size: int,
    processes: int = 1,
    skip_broken: bool = False,
    path_map: str = "",
) -> str:
    """Pack a dataset; return the dataset string of the result.

    Args:
        dataset_str: what to pack.
        output: folder of the shards.
        kind: ``webdataset`` or ``parquet``.
        shard_size: images per shard.
        processes: that write shards side by side.
        skip_broken: leave out what is no image instead of stopping.
        path_map: where recorded folders of the dataset lie here, ``/old=/new,/other=/elsewhere``.

    Raises:
        ConfigError: the folder holds shards of another plan, or the dataset is a mixture with weights.
        DatasetError: an image can not be read.
        OutputError: the folder can not be written, or images are missing in the end.
    """
    for option, value in (("--shard-size", shard_size), ("--processes", processes)):
        if value < 1:
            raise ConfigError(f"{option} is {value}; use 1 or more")
    dataset = make_dataset(dataset_str=dataset_str, path_map=PathMap.parse(path_map))
    if isinstance(dataset, MixtureDataset) and dataset.weights is not None:
        raise ConfigError(
            "a mixture with weights is not packed: pack its parts, and give the weights in training"
        )
    labelled = dataset.get_target(0) is not None
    classes = getattr(dataset, "classes", None)
    plan = Plan(dataset_str, kind, shard_size, len(dataset), list(classes) if classes else None)
    folder = Path(output)
    _begin(plan, folder)
    missing = [number for number in range(plan.shards) if not plan.shard_path(folder, number).exists()]
    logger.info("%d of %d shards are there already", plan.shards - len(missing), plan.shards)
    _write_all(Packer(dataset, plan, folder, skip_broken), missing, processes)
    return _check(plan, folder, labelled)


def _begin(plan: Plan, folder: Path) -> None:
    path = folder / PLAN
    if path.exists():
        earlier = json.loads(path.read_text("utf-8"))
        changed = [key for key, value in asdict(plan).items() if earlier.get(key) != value]
        if changed:
            raise ConfigError(
                f'"{folder}" holds shards of another {" and ".join(changed)}, see {path}: choose an '
                "empty folder"
            )
        return
    with atomic_file(str(path)) as file:
        file.write(json.dumps(asdict(plan), indent=1).encode())


def _write_all(packer: Packer, numbers: list[int], processes: int) -> None:
    began = told = time.monotonic()
    images = 0
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("fork"), initializer=_set_packer, initargs=(packer,)
    ) as pool:
        for done, written in enumerate(pool.map(_write_shard, numbers), 1):
            images += written
            if time.monotonic() - told > PROGRESS_SECONDS or done == len(numbers):
                told = time.monotonic()
                rate = images / max(told - began, 1e-9)
                left = (told - began) / done * (len(numbers) - done)
                logger.info(
                    "%d of %d shards, %d images/s, %.0f min left", *(done, len(numbers), rate, left / 60)
                )


_packer: Packer | None = None


def _set_packer(packer: Packer) -> None:
    global _packer
    _packer = packer


def _write_shard(number: int) -> int:
    return _packer.write(number)


def _check(plan: Plan, folder: Path, labelled: bool) -> str:
    """Open what was packed and count it."""
    name, label = ("WebDataset", "cls") if plan.format == "webdataset" else ("Parquet", "label")
    text = format_dataset_string(name, root=folder, **({"label": label} if labelled else {}))
    skipped = set()
    if (folder / SKIPPED).exists():
        lines = (folder / SKIPPED).read_text("utf-8").splitlines()
        skipped = {line.partition("\t")[0] for line in lines}
    count = len(make_dataset(dataset_str=text))
    if count != plan.images - len(skipped):
        raise OutputError(
            f'"{folder}" holds {count} images, but {plan.images} less {len(skipped)} left out were to be '
            "packed: delete the shards that other runs left there and run again"
        )
    cli.say(f"{count} images in {plan.shards} shards, each read back and compared; {len(skipped)} left out")
    cli.say(text)
    return text


def main(arguments: list[str] | None = None) -> None:
    """Pack the images of a dataset into shards."""
    parser = argparse.ArgumentParser(prog="scripts/pack_shards.py", description=main.__doc__)
    parser.add_argument("--dataset", required=True, help="dataset string, mixtures too")
    parser.add_argument(
        "--path-map", default="", help="where the dataset's folders lie here: /old=/new,/other=/elsewhere"
    )
    parser.add_argument("--output", required=True, help="folder of the shards")
    parser.add_argument("--format", default="webdataset", choices=("webdataset", "parquet"))
    parser.add_argument(
        "--shard-size", type=int, default=10000, help="images per shard (default: %(default)s)"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="that write side by side (default: %(default)s)"
    )
    parser.add_argument(
        "--skip-broken", action="store_true", help="leave out what is no image, see skipped.tsv"
    )
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pack(
        args.dataset,
        args.output,
        kind=args.format,
        shard_size=args.shard_size,
        processes=args.processes,
        skip_broken=args.skip_broken,
        path_map=args.path_map,
    )


if __name__ == "__main__":
    cli.run(main)
