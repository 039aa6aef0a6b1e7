"""Are the crops, their normalisation and the tiles themselves those that the config and the weights mean?"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from omegaconf import DictConfig
from PIL import Image
from torch import nn

from dinov2 import distributed
from dinov2.data.device_crops import finish_sample
from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from dinov2.models.companions import Constants
from dinov2.models.report import LoadReport
from dinov2.train.self_check.probe import Start
from dinov2.train.self_check.record import Line

DRAWS = 16  # a white image stays white in about 6 of 10 crops
PICTURE_SIDE = 32  # pixels
CLOSE = 1e-3  # half a grey level of 256 is 2e-3


def check_crops(start: Start) -> Iterator[Line]:
    """Compare crops as they come out of the collate with the config, the patches and the stored positions."""
    patch = start.cfg.student.patch_size
    kernel = _kernel(start.student)
    if kernel is not None and kernel != patch:
        text = f"student.patch_size is {patch}, but the patch embedding takes patches of {kernel} px"
        yield Line("patch size", "wrong", text, {"config": patch, "model": kernel})
    names = ["global", "local"] if start.model.num_local_crops else ["global"]
    stored = _position_grid(start.student)
    for name in names:
        yield _crop(start, name, patch, stored)
    part = start.initial.parts.get("student.backbone")
    if part is not None and start.is_fresh:
        for parameter, how in part.report.resampled.items():
            yield Line(f"resampled: {parameter}", "note", f"from {part.report.source}: {how}")


def _crop(start: Start, name: str, patch: int, stored: int | None) -> Line:
    label, asked = f"{name} crops", start.cfg.crops[f"{name}_crops_size"]
    height, width = start.images[f"collated_{name}_crops"].shape[-2:]
    grid = height // patch
    values = {"pixels": [height, width], "patch": patch, "grid": grid, "positions": stored}
    if (height, width) != (asked, asked):
        text = f"{height} x {width} px instead of crops.{name}_crops_size {asked}"
        return Line(label, "wrong", text, values)
    if height % patch:
        return Line(label, "wrong", f"{height} px are no multiple of the patch size {patch}", values)
    text = f"{height} px = {grid} x {grid} patches of {patch} px"
    if stored is not None and stored != grid:
        text += f"; positions of {stored} x {stored} are interpolated"
        return Line(label, "note", text, values)
    return Line(label, "ok", text, values)


def _kernel(backbone: nn.Module) -> int | None:
    for name, parameter in backbone.named_parameters():
        if "patch_embed" in name and parameter.ndim == 4:
            return parameter.shape[-1]
    return None


def _position_grid(backbone: nn.Module) -> int | None:
    """Side of the square of positions the backbone stores, with or without one for the cls token."""
    for name, parameter in backbone.named_parameters():
        if name.endswith(("pos_embed", "position_embeddings")) and parameter.ndim == 3:
            count = parameter.shape[1]
            sides = [math.isqrt(n) for n in (count - 1, count) if math.isqrt(n) ** 2 == n]
            return sides[0] if sides else None
    return None


def check_normalisation(start: Start) -> Iterator[Line]:
    """Measure the transform's constants, and compare them with the config's and the source model's."""
    config: Constants = (tuple(start.cfg.crops.mean), tuple(start.cfg.crops.std))
    used = measure_constants(_transform_in_use(start.dataset), config, side=_enough_pixels(start.cfg.crops))
    name = "normalisation: crops"
    if used is None:
        yield Line(name, "note", "not measured: the dataset's transform does not take a plain picture")
        used = config
    elif _same(used, config):
        yield Line(name, "ok", f"{_named(used)}, measured on a black and a white picture", {"measured": used})
    else:
        text = f"the transform uses {_named(used)}, but crops.mean and crops.std say {_named(config)}"
        yield Line(name, "wrong", text, {"measured": used, "config": config})
    part = start.initial.parts.get("student.backbone")
    if part is not None:
        yield _source_normalisation(part.report, used)


def _source_normalisation(report: LoadReport, used: Constants) -> Line:
    """Compare the constants in use with those of the weights; a guess by sizes is no ground to stop a run."""
    name, source = "normalisation: source", report.normalisation
    if source is None:
        return Line(
            name, "note", f"{report.source} does not state its constants; the run uses {_named(used)}"
        )
    origin = report.normalisation_origin
    values = {"source": source, "used": used, "origin": origin}
    subject = f"{report.source} was trained with"
    if origin == "sizes":
        subject = f"{report.source} has the sizes of a published model, which was trained with"
    if _same(used, source):
        return Line(name, "ok", f"{subject} the same constants", values)
    text = f"{subject} {_named(source)}, but the run uses {_named(used)}"
    return Line(name, "note" if origin == "sizes" else "wrong", text, values)


def _transform_in_use(dataset: Any) -> Callable[[Image.Image], Any] | None:
    """torchvision's datasets apply ``transforms``; their ``transform`` is only what it was made of."""
    both = getattr(dataset, "transforms", None)
    if both is not None:
        return lambda image: both(image, None)[0]
    return getattr(dataset, "transform", None)


def _enough_pixels(crops: DictConfig) -> int:
    """Return the side of a picture that every kind of crop can be cut from."""
    if crops.scale_reference == "image":
        return PICTURE_SIDE
    kinds = [(crops[f"{kind}_crops_size"], crops[f"{kind}_crops_scale"][0]) for kind in ("global", "local")]
    return max(PICTURE_SIDE, *(math.ceil(size * math.sqrt(least)) for size, least in kinds))


def measure_constants(
    transform: Callable[[Image.Image], Any] | None, expected: Constants, *, side: int = PICTURE_SIDE
) -> Constants | None:
    """Return (mean, std) by which a multi-crop transform normalises, from what it makes of black and white.

    Jitter, blur and grayscale leave black as it is; white they may darken, so the brightest of several
    draws counts, until one shows the constants that are ``expected``. Pictures have ``side`` pixels.
    """
    if transform is None:
        return None
    low, high = [math.inf] * 3, [-math.inf] * 3
    found: Constants | None = None
    for _ in range(DRAWS):
        try:
            pictures = [Image.new("RGB", (side, side), shade) for shade in ("black", "white")]
            views = [finish_sample(transform(picture)) for picture in pictures]
            crops = [crop for view in views for crop in (*view["global_crops"], *view["local_crops"])]
            extremes = [(crop.amin(dim=(1, 2)).tolist(), crop.amax(dim=(1, 2)).tolist()) for crop in crops]
        except (TypeError, KeyError, AttributeError, ValueError):
            return None
        for least, most in extremes:
            low = [min(pair) for pair in zip(low, least, strict=True)]
            high = [max(pair) for pair in zip(high, most, strict=True)]
        std = tuple(1.0 / (b - a) if b > a else math.inf for a, b in zip(low, high, strict=True))
        found = (tuple(-a * s for a, s in zip(low, std, strict=True)), std)
        if _same(found, expected):
            break
    return found


def _same(one: Constants, other: Constants) -> bool:
    pairs = zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True)
    return all(abs(a - b) < CLOSE for a, b in pairs)


def _named(constants: Constants) -> str:
    known = " (ImageNet's)" if _same(constants, (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)) else ""
    mean, std = ([f"{value:.3f}" for value in part] for part in constants)
    return f"mean {' '.join(mean)} and std {' '.join(std)}{known}"


def check_duplicates(start: Start) -> Iterator[Line]:
    """Look for tiles that come twice among the first of all processes; every process gets the same answer."""
    tiles = [tile for tiles in distributed.all_gather_objects(start.tiles) for tile in tiles]
    yield _duplicates(tiles, len(start.dataset))


def _duplicates(tiles: Sequence[tuple[int, str]], dataset_length: int) -> Line:
    name = "duplicate tiles"
    indices, pictures = Counter(index for index, _ in tiles), Counter(digest for _, digest in tiles)
    repeats, copies = len(tiles) - len(indices), len(indices) - len(pictures)
    values = {"tiles": len(tiles), "same_index": repeats, "same_image": copies}
    if len(tiles) > 1 and len(pictures) == 1 and dataset_length > 1:
        return Line(name, "wrong", f"the first {len(tiles)} tiles are all the same picture", values)
    if repeats or copies:
        text = f"of the first {len(tiles)} tiles {repeats} come twice and {copies} equal another one"
        return Line(name, "note", text, values)
    return Line(name, "ok", f"none among the first {len(tiles)}", values)
