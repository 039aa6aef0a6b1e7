"""Images per second of each augmentation pipeline, and whether the fast one makes the same crops.

    python scripts/bench_data.py [--against FOLDER] [--output FILE]

One process, one thread. The tiles are JPEG files (quality 90) cut from the shipped slide and picture; a rate
counts decoding and all crops of DINOv2's recipe (2 x 224 px, 8 x 96 px). The yardstick is a plain
torchvision pipeline on PIL images, written out here. The pipelines take turns within a round, and a ratio is
formed within its round, so that a busy machine slows all alike. Prints the Markdown tables of
docs/augmentation.md. ``--against`` times the augmentation of another checkout, this project's or DINOv2's
own, in turn with ours, each in a process of its own, and nothing else.
"""

import argparse
import io
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from dinov2 import cli  # noqa: E402 - the line above makes the packages known to a script
from dinov2.data import DataAugmentationDINO  # noqa: E402
from dinov2.data.crop_parameters import CropParameters, draw_crop, from_row  # noqa: E402
from dinov2.data.datasets.decoders import ImageDataDecoder  # noqa: E402
from dinov2.data.datasets.tensor_decoder import to_tensor  # noqa: E402
from dinov2.data.device_crops import OPERATIONS, change_all_colours, change_colours_in_groups  # noqa: E402
from dinov2.data.fast_crops import cut  # noqa: E402
from dinov2.data.photometric import change_colours, normalizers  # noqa: E402
from dinov2.data.random_stream import RandomStream  # noqa: E402
from dinov2.data.transforms import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD  # noqa: E402
from dinov2.errors import ConfigError  # noqa: E402
from dinov2.utils.device import resolve_device  # noqa: E402
from scripts.quickstart.tiles import CARCINOMA, read_slide, tile_corners, tissue_mask  # noqa: E402
from scripts.speed.checkouts import Checkout, check_tree  # noqa: E402
from scripts.speed.report_file import check_report, write_report  # noqa: E402

TILE_SIZES = (224, 512)
JPEG_QUALITY = 90
SCALES = ((0.32, 1.0), (0.05, 0.32))
LOCAL_CROPS = 8
COLOUR_BATCH = 8  # images per call when the colours alone are timed on a CPU; 64 on a GPU
PLAIN = "plain torchvision v1 on PIL"
OTHER = "the other checkout"
PIPELINES = ("reference", "fast", "device, CPU part")
AUGMENTING = REPO / "scripts" / "speed" / "augmenting.py"
SIGNIFICANCE = 0.01  # for all tests together

# Images per second that one H100 trains on at 50 % of its peak (calc), without and with drop path 0.3.
NEEDED = {"ViT-S/14": (2384, 3080), "ViT-L/16": (193, 257)}

Pipeline = Callable[[Image.Image], dict[str, Any]]


def plain_pipeline(global_size: int = 224, local_size: int = 96, *, colours: bool = True) -> Pipeline:
    """Return DINOv2's recipe, with its effective blur probabilities, of torchvision's own steps alone.

    Without ``colours`` there is no jitter, grey or solarisation; the blur stays, as it does in ours.
    """

    def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> transforms.Compose:
        crop = transforms.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC)
        jitter = transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
        changes = [
            *([jitter, transforms.RandomGrayscale(0.2)] if colours else []),
            transforms.RandomApply([transforms.GaussianBlur(9, (0.1, 2.0))], p=blur),
            *([transforms.RandomSolarize(128, solarize)] if colours and solarize else []),
        ]
        last = [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
        flip = transforms.RandomHorizontalFlip(0.5)
        return transforms.Compose([crop, flip, *changes, *last])

    first, second = (view(global_size, SCALES[0], *rates) for rates in ((0.0, 0.0), (0.9, 0.2)))
    local = view(local_size, SCALES[1], 0.5, 0.0)

    def augment(image: Image.Image) -> dict[str, Any]:
        return {
            "global_crops": [first(image), second(image)],
            "local_crops": [local(image) for _ in range(LOCAL_CROPS)],
        }

    return augment


def our_pipeline(name: str, *sizes: int, **options: Any) -> DataAugmentationDINO:
    """Return the package's augmentation with the same parameters."""
    return DataAugmentationDINO(*SCALES, LOCAL_CROPS, *sizes, pipeline=name, **options)


@cache
def make_files(size: int) -> list[bytes]:
    """Cut tissue tiles from the shipped slide and picture; return them as JPEG files."""
    files = []
    with Image.open(CARCINOMA) as picture:
        sources = [read_slide(), picture.convert("RGB")]
    for source in sources:
        for x, y in tile_corners(tissue_mask(np.asarray(source)), size=size, stride=size):
            buffer = io.BytesIO()
            source.crop((x, y, x + size, y + size)).save(buffer, "JPEG", quality=JPEG_QUALITY)
            files.append(buffer.getvalue())
    return files


def decode(data: bytes) -> Image.Image:
    """Decode as the datasets do, checks for damage included."""
    return ImageDataDecoder(data).decode()


def decode_plainly(data: bytes) -> Image.Image:
    """Decode as torchvision's ``default_loader`` does."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


@dataclass(frozen=True)
class Timing:
    """One contender of a table; seconds per image in each round."""

    cpu: list[float]
    wall: list[float]

    def rate(self, clock: str) -> float:
        """Images per second of the median round."""
        return 1 / median(getattr(self, clock))

    def gain(self, yardstick: "Timing") -> tuple[float, float, float]:
        """How many times as fast as ``yardstick``, by CPU time: median, smallest and largest round."""
        ratios = [base / own for base, own in zip(yardstick.cpu, self.cpu, strict=True)]
        return median(ratios), min(ratios), max(ratios)


def race(contenders: dict[str, Callable[[int], Any]], *, rounds: int, images: int) -> dict[str, Timing]:
    """Let the contenders take turns, image by image; a round is the mean over ``images`` images."""
    timings = {name: Timing([], []) for name in contenders}
    for turn in range(rounds + 1):
        spent = {name: [0.0, 0.0] for name in contenders}
        for number in range(images):
            for name, run in contenders.items():
                torch.manual_seed(images * turn + number)
                cpu, wall = time.thread_time(), time.perf_counter()
                run(number)
                spent[name][0] += time.thread_time() - cpu
                spent[name][1] += time.perf_counter() - wall
        for name, (cpu, wall) in spent.items():
            if turn:  # the first round warms up
                timings[name].cpu.append(cpu / images)
                timings[name].wall.append(wall / images)
    return timings


def race_pipelines(size: int, *, rounds: int, images: int) -> dict[str, Timing]:
    """Time the pipelines on tiles of ``size`` pixels, from the file to the crops."""
    files = make_files(size)

    def from_file(augment: DataAugmentationDINO, number: int) -> Any:
        return augment(augment.image_decoder(files[number % len(files)]).decode())

    plain = plain_pipeline()
    runs: dict[str, Callable[[int], Any]] = {
        PLAIN: lambda number: plain(decode_plainly(files[number % len(files)])),
        "reference": partial(from_file, our_pipeline("reference")),
        "fast": partial(from_file, our_pipeline("fast")),
        "device, CPU part": partial(from_file, our_pipeline("device")),
    }
    runs["decoding alone"] = lambda number: decode(files[number % len(files)])
    return race(runs, rounds=rounds, images=images)


def race_checkouts(other: Path, size: int, *, rounds: int, images: int) -> dict[str, Timing]:
    """Time our pipelines and the augmentation of another checkout in turn, on tiles of ``size`` pixels."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for number, data in enumerate(make_files(size)):
            Path(folder, f"{number:05d}.jpg").write_bytes(data)
        settings = {"files": folder, "scales": SCALES, "local_crops": LOCAL_CROPS}
        trees = {OTHER: (other, ""), **{f"here, {name}": (REPO, name.split(",")[0]) for name in PIPELINES}}
        sides = {
            name: stack.enter_context(Checkout(tree, AUGMENTING, {**settings, "pipeline": pipeline}, 1))
            for name, (tree, pipeline) in trees.items()
        }
        timings = {name: Timing([], []) for name in sides}
        for turn in range(rounds + 1):
            spent = {name: [side.ask("run", number=0)] for name, side in sides.items()}
            for number in range(images):
                for name, side in sides.items():
                    spent[name].append(side.ask("run", number=images * turn + number))
            for name, seconds in spent.items():
                if turn:  # the first round warms up, as the first image of each does
                    timings[name].cpu.append(sum(each["cpu"] for each in seconds[1:]) / images)
                    timings[name].wall.append(sum(each["wall"] for each in seconds[1:]) / images)
    return timings


def race_stages(size: int, *, rounds: int, images: int) -> dict[str, Timing]:
    """Time the stages of the ``fast`` pipeline one by one."""
    tiles = [decode(data) for data in make_files(size)[:images]]
    pixels = [to_tensor(tile) for tile in tiles]
    kinds = our_pipeline("device").recipes
    recipes = [kinds["global_1"], kinds["global_2"], *[kinds["local"]] * LOCAL_CROPS]

    def draw(_: int) -> list[CropParameters]:
        stream = RandomStream()
        return [draw_crop(recipe, size, size, stream) for recipe in recipes]

    drawn = [draw(number) for number in range(len(tiles))]

    def cut_all(number: int) -> list[torch.Tensor]:
        pairs = zip(recipes, drawn[number], strict=True)
        return [cut(pixels[number], recipe.size, crop) for recipe, crop in pairs]

    raw = [cut_all(number) for number in range(len(tiles))]
    crops = [[crop.contiguous().float() for crop in of_tile] for of_tile in raw]
    offset, scale = normalizers(*torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD]))

    def finish(number: int) -> list[torch.Tensor]:
        return [torch.addcmul(offset, crop.contiguous().float(), scale) for crop in raw[number]]

    def change(number: int, **without: Any) -> list[torch.Tensor]:
        pairs = zip(crops[number], drawn[number], strict=True)
        return [change_colours(x, crop.photometrics._replace(**without)) for x, crop in pairs]

    stages = {
        "PIL image to tensor": lambda number: to_tensor(tiles[number]),
        "drawing random numbers": draw,
        "cutting and resizing 10 crops": cut_all,
        "jitter and grey": partial(change, sigma=0.0, solarize=False),
        "blur and solarize": partial(change, order=(), grayscale=False),
        "to float32, normalising": finish,
    }
    return race(stages, rounds=rounds, images=len(tiles))


def time_colours(device: torch.device, *, rounds: int) -> dict[str, float]:
    """Return seconds per image for the colours of whole batches, by the way they are computed."""
    batch = 64 if device.type == "cuda" else COLOUR_BATCH
    files, augment = make_files(TILE_SIZES[0]), our_pipeline("device")
    samples = [augment(decode(files[number % len(files)])) for number in range(batch)]
    parts = []
    for kind in ("global", "local"):
        crops = torch.stack([crop for sample in samples for crop in sample[f"{kind}_crops"]])
        parts.append((crops.to(device), torch.cat([sample[f"{kind}_photometrics"] for sample in samples])))
    ways: dict[str, Callable[..., Any]] = {"eager": change_all_colours}
    if device.type == "cuda":
        compiled = {name: torch.compile(run, dynamic=True) for name, run in OPERATIONS.items()}
        ways["compiled"] = lambda crops, rows: change_colours_in_groups(
            crops, rows, [from_row(row) for row in rows.tolist()], compiled
        )
    return {name: _seconds(run, parts, device, rounds) / batch for name, run in ways.items()}


def _seconds(run: Callable[..., Any], parts: Sequence[tuple], device: torch.device, rounds: int) -> float:
    """Median time of one pass over ``parts``; CPU time on a CPU, waiting included on a GPU."""
    on_gpu = device.type == "cuda"
    clock, spent = time.perf_counter if on_gpu else time.thread_time, []
    for _ in range(rounds + 1):
        begin = clock()
        for part in parts:
            run(*part)
        if on_gpu:
            torch.cuda.synchronize(device)
        spent.append(clock() - begin)
    return median(spent[1:])


@dataclass(frozen=True)
class Agreement:
    """One statistical comparison of two pipelines."""

    quantity: str
    test: str
    draws: int
    p_value: float


def compare_colours(
    one: Pipeline, other: Pipeline, images: Sequence[Image.Image], seed: int = 0
) -> list[Agreement]:
    """Compare the distributions of the crops' channel means and variances, with different seeds."""
    from scipy.stats import ks_2samp

    first, second = (_colour_moments(make, images, own) for own, make in enumerate((one, other), start=seed))
    return [
        Agreement(name, "Kolmogorov-Smirnov", len(first[name]), ks_2samp(first[name], second[name]).pvalue)
        for name in first
    ]


def _colour_moments(make: Pipeline, images: Sequence[Image.Image], seed: int) -> dict[str, np.ndarray]:
    torch.manual_seed(seed)
    samples = [make(image) for image in images]
    found = {}
    for kind in ("global", "local"):
        crops = torch.stack([crop for sample in samples for crop in sample[f"{kind}_crops"]]).flatten(2)
        moments = {"mean": crops.mean(dim=2), "variance": crops.var(dim=2)}
        for moment, values in moments.items():
            for channel, colour in enumerate(("red", "green", "blue")):
                found[f"{kind} crops, {moment} of {colour}"] = values[:, channel].numpy()
    return found


def compare_geometry(one: Pipeline, other: Pipeline, draws: int, seed: int = 0) -> list[Agreement]:
    """Compare areas, aspect ratios and flips of regions, read off crops of a picture of coordinates."""
    from scipy.stats import chi2_contingency, ks_2samp

    first, second = (_regions(make, draws, own) for own, make in enumerate((one, other), start=seed))
    found = []
    for name in ("area of global crops", "area of local crops", "aspect ratio"):
        p_value = ks_2samp(first[name], second[name]).pvalue
        found.append(Agreement(name, "Kolmogorov-Smirnov", len(first[name]), p_value))
    flips = [[int(part["flips"].sum()), int((~part["flips"]).sum())] for part in (first, second)]
    found.append(Agreement("flips", "chi-square", len(first["flips"]), chi2_contingency(flips).pvalue))
    return found


def _regions(make: Pipeline, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Areas (shares of the picture), aspect ratios and flips of the regions of ``draws`` pictures."""
    ramp = np.arange(256, dtype=np.uint8)
    columns, rows = np.meshgrid(ramp, ramp)
    picture = Image.fromarray(np.stack([columns, rows, rows], axis=2))
    std = torch.tensor(IMAGENET_DEFAULT_STD) * 255
    extents: dict[str, list] = {"global": [], "local": []}
    torch.manual_seed(seed)
    for _ in range(draws):
        sample = make(picture)
        for kind, found in extents.items():
            crops = torch.stack(sample[f"{kind}_crops"])
            side = crops.shape[-1]
            # From the middle of the first to the middle of the last pixel, and half a pixel on either side.
            wide = (crops[:, 0, :, -1] - crops[:, 0, :, 0]).mean(dim=1) * std[0] * side / (side - 1)
            high = (crops[:, 1, -1] - crops[:, 1, 0]).mean(dim=1) * std[1] * side / (side - 1)
            found.append(torch.stack([wide, high]))
    (global_w, global_h), (local_w, local_h) = (torch.cat(v, dim=1).numpy() for v in extents.values())
    widths, heights = np.concatenate([global_w, local_w]), np.concatenate([global_h, local_h])
    return {
        "area of global crops": np.abs(global_w * global_h) / 256**2,
        "area of local crops": np.abs(local_w * local_h) / 256**2,
        "aspect ratio": np.abs(widths / heights),
        "flips": widths < 0,
    }


def rate_table(timings: dict[int, dict[str, Timing]], yardstick: str = PLAIN) -> list[str]:
    """Return the lines of the table of rates."""
    heads = [f"{size} px: {what}" for size in timings for what in ("CPU", "wall", "gain")]
    lines = [f"| pipeline | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name in next(iter(timings.values())):
        cells = []
        for by_name in timings.values():
            own, base = by_name[name], by_name[yardstick]
            gain, least, most = own.gain(base)
            cells += [f"{own.rate('cpu'):.0f}", f"{own.rate('wall'):.0f}"]
            cells += [f"{gain:.2f} ({least:.2f} to {most:.2f})"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def stage_table(stages: dict[int, dict[str, Timing]]) -> list[str]:
    """Return the lines of the table of stages."""
    lines = [f"| stage | {' | '.join(f'{size} px' for size in stages)} |", f"|---|{'---|' * len(stages)}"]
    for stage in next(iter(stages.values())):
        cells = [f"{1e3 * median(timings[stage].cpu):.2f}" for timings in stages.values()]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return lines


def core_table(timings: dict[int, dict[str, Timing]]) -> list[str]:
    """Return the lines of the table of cores that feed one GPU."""
    networks = [f"{name}, {low} to {high} images/s" for name, (low, high) in NEEDED.items()]
    lines = [f"| tiles | pipeline | {' | '.join(networks)} |", f"|---|---|{'---|' * len(networks)}"]
    for size, by_name in timings.items():
        for name in ("reference", "fast", "device, CPU part"):
            rate = by_name[name].rate("cpu")
            cells = [f"{math.ceil(low / rate)} to {math.ceil(high / rate)}" for low, high in NEEDED.values()]
            lines.append(f"| {size} px | {name} | {' | '.join(cells)} |")
    return lines


def agreement_table(found: Sequence[Agreement]) -> list[str]:
    """Return the lines of the table of statistical comparisons, and the verdict below it."""
    limit = SIGNIFICANCE / len(found)
    lines = ["| quantity | test | draws each | p |", "|---|---|---|---|"]
    lines += [f"| {a.quantity} | {a.test} | {a.draws} | {a.p_value:.3f} |" for a in found]
    differing = [a.quantity for a in found if a.p_value < limit]
    verdict = f"differ in: {', '.join(differing)}" if differing else "agree"
    return [
        *lines,
        "",
        f"The pipelines {verdict} (level {SIGNIFICANCE:g} over {len(found)} tests: p below {limit:.1e}).",
    ]


def get_args_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser("bench_data", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="of each timing (default: 7)")
    parser.add_argument("--images", type=int, default=8, help="per pipeline and round (default: 8)")
    parser.add_argument("--draws", type=int, default=150, help="images per comparison (default: 150)")
    parser.add_argument("--seed", type=int, default=0, help="of the comparison, and the next (default: 0)")
    parser.add_argument("--against", type=Path, help="folder of another checkout, in which dinov2 lies")
    parser.add_argument("--output", type=Path, help="JSON file to write, in seconds per image")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="for the colours")
    return parser


def as_json(timings: dict[int, dict[str, Timing]]) -> dict[str, Any]:
    """Return the seconds per image of every round, by size and name."""
    return {str(size): {name: asdict(timing) for name, timing in of.items()} for size, of in timings.items()}


def main(args: argparse.Namespace) -> None:
    """Print the tables."""
    for name in ("rounds", "images", "draws"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; use 1 or more")
    check_report(args.output)
    if args.against is not None:
        check_tree(args.against, "dinov2/data")
        race = partial(race_checkouts, args.against, rounds=args.rounds, images=args.images)
        timings = {size: race(size) for size in TILE_SIZES}
        cli.say(
            f"Images per second and core, and gain over {args.against} (range of {args.rounds} rounds):\n"
        )
        cli.say("\n".join(rate_table(timings, yardstick=OTHER)))
        write_report(args.output, {"pipelines": as_json(timings)})
        return
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as the loader's workers do; it speeds the PIL pipelines up
    device = resolve_device(args.device)
    timings = {size: race_pipelines(size, rounds=args.rounds, images=args.images) for size in TILE_SIZES}
    cli.say(f"Images per second and core, and gain over {PLAIN} (range of {args.rounds} rounds):\n")
    cli.say("\n".join(rate_table(timings)))
    cli.say("\nStages of fast beside decoding, ms of CPU time per image:\n")
    stages = {size: race_stages(size, rounds=args.rounds, images=args.images) for size in TILE_SIZES}
    cli.say("\n".join(stage_table(stages)))
    cli.say(f"\nColours of whole batches on {device.type}, ms per image:")
    colours = time_colours(device, rounds=args.rounds)
    for way, seconds in colours.items():
        cli.say(f"- {way}: {1e3 * seconds:.3f}")
    cli.say("\nCores that feed one H100 (calc):\n")
    cli.say("\n".join(core_table(timings)))
    cli.say(f"\nfast against {PLAIN}:\n")
    found = agreement(args.draws, seed=args.seed)
    cli.say("\n".join(agreement_table(found)))
    report = {"pipelines": as_json(timings), "stages": as_json(stages)}
    report |= {"colours": {device.type: colours}, "agreement": [asdict(comparison) for comparison in found]}
    write_report(args.output, report)


def agreement(draws: int, name: str = "fast", *, seed: int = 0, **options: Any) -> list[Agreement]:
    """Compare a pipeline of ours with the plain one, on small crops of real tiles."""
    files = make_files(TILE_SIZES[0])
    images = [decode(files[number % len(files)]) for number in range(draws)]
    colours = compare_colours(plain_pipeline(96, 48), our_pipeline(name, 96, 48, **options), images, seed)
    quiet = {"color_jitter_prob": 0.0, "grayscale_prob": 0.0, "solarize_prob": 0.0, **options}
    plain = plain_pipeline(32, 32, colours=False)
    return colours + compare_geometry(plain, our_pipeline(name, 32, 32, **quiet), draws, seed)


if __name__ == "__main__":
    cli.run(main, get_args_parser().parse_args())
