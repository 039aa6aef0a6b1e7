"""Where folders that were recorded on another machine lie on this one (``train.path_map``, ``sshid``).

One rule for all datasets. Of the old folders of a map that a recorded path begins with, the longest is
replaced by its new folder, once: nothing is mapped again. Where several maps are given, the first that knows
the path decides, in this order: the key ``path_map`` of the dataset string, ``train.path_map``, ``sshid``.
After that the tile size of ``sshid=448`` is put in, which says what is read and not where it lies.
"""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Union

from dinov2.errors import DatasetError

_HELP = "give the folder as it was recorded and the folder here, both from / on"


@dataclass(frozen=True)
class PathMap:
    """Replaces the beginning of recorded paths, and parts of them.

    Attributes:
        prefixes: pairs (old, new) of folders; the longest old one that a path begins with is replaced.
        parts: pairs (old, new) replaced anywhere, after the prefix.
        otherwise: the map that is asked for a path that begins with none of the old folders.

    Raises:
        DatasetError: a folder is empty or not given from ``/`` on, is mapped onto itself, or occurs twice.
    """

    prefixes: tuple[tuple[str, str], ...] = ()
    parts: tuple[tuple[str, str], ...] = ()
    otherwise: "PathMap | None" = None

    def __post_init__(self) -> None:
        # Without the slash at the end "/data" means the folder, and not "/database" as well.
        trimmed = tuple(
            (old.rstrip("/") or old[:1], new.rstrip("/") or new[:1]) for old, new in self.prefixes
        )
        object.__setattr__(self, "prefixes", trimmed)
        for old, new in trimmed:
            for folder in (old, new):
                if not folder.startswith("/"):
                    raise DatasetError(f'the path map has "{old}" -> "{new}"; {_HELP}')
            if old == new:
                raise DatasetError(f'the path map has "{old}" -> "{new}", onto itself: leave it out')
        olds = [old for old, _ in trimmed]
        if len(set(olds)) < len(olds):
            twice = next(old for old in olds if olds.count(old) > 1)
            raise DatasetError(f'the path map has two entries for "{twice}": leave one')

    @classmethod
    def parse(cls, text: str) -> "PathMap":
        """Read ``/old=/new,/other=/elsewhere``, the form for dataset strings and command lines.

        Raises:
            DatasetError: a pair lacks one side, or as for the class.
        """
        pairs = [pair.partition("=") for pair in text.split(",") if pair]
        for old, _, new in pairs:
            if not old or not new:
                raise DatasetError(f'the path_map is "{text}"; write it as /old=/new,/other=/elsewhere')
        return cls(prefixes=tuple((old, new) for old, _, new in pairs))

    @classmethod
    def of(cls, value: Union["PathMap", Mapping[str, str], str, None]) -> "PathMap":
        """Return the map that a config (a mapping), a dataset string (a text) or nothing gives.

        Raises:
            DatasetError: as for the class.
        """
        if isinstance(value, PathMap):
            return value
        if isinstance(value, Mapping):
            return cls(prefixes=tuple((str(old), str(new)) for old, new in value.items()))
        return cls.parse(value) if value else cls()

    def or_else(self, other: "PathMap") -> "PathMap":
        """Return this map, with ``other`` for the paths that it does not know."""
        rest = other if self.otherwise is None else self.otherwise.or_else(other)
        return PathMap(self.prefixes, self.parts, rest)

    def __call__(self, path: str) -> str:
        """Return where a recorded path lies here."""
        path = self._replace_prefix(path)
        link: PathMap | None = self
        while link is not None:
            for old, new in link.parts:
                path = path.replace(old, new)
            link = link.otherwise
        return path

    def __bool__(self) -> bool:
        return bool(self.prefixes or self.parts or self.otherwise)

    def _replace_prefix(self, path: str) -> str:
        matching = [(old, new) for old, new in self.prefixes if _begins_with(path, old)]
        if matching:
            old, new = max(matching, key=lambda pair: len(pair[0]))
            return new.rstrip("/") + path[len(old.rstrip("/")) :] or "/"
        return path if self.otherwise is None else self.otherwise._replace_prefix(path)


def _begins_with(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


# What the forks tied to the names of their machines; any other sshid changes nothing.
SSHID_PATH_MAPS = {
    "11": PathMap(prefixes=(("/data", "/nfs/data13"), ("/nfs/data11", "/data"))),
    "448": PathMap(parts=(("/20x_224px_0px_overlap/", "/40x_448px_0px_overlap/"),)),
}


def mapped_from(recorded: str, path: str) -> str:
    """Return what a sentence about ``path`` says of its form before the path map; nothing if it had none."""
    return f' (recorded as "{recorded}" and changed by the path map)' if recorded != path else ""


# Keys of dataset strings whose values are paths.
PATH_OPTIONS = ("root", "extra", "manifest", "coords")


def map_options(options: Mapping[str, Any], accepted: Container[str], path_map: PathMap) -> dict[str, Any]:
    """Return the options of a dataset with its paths mapped, and with the map itself where it takes one.

    Args:
        options: from the dataset string.
        accepted: the parameters of the dataset; ``path_map`` gets the string's own map, then the general one.
        path_map: the general map.
    """
    mapped = {key: path_map(value) if key in PATH_OPTIONS else value for key, value in options.items()}
    if path_map and "path_map" in accepted:
        mapped["path_map"] = PathMap.of(options.get("path_map")).or_else(path_map)
    return mapped


@contextmanager
def explained_paths(options: Mapping[str, Any], path_map: PathMap) -> Iterator[None]:
    """Add to an error about a dataset what the map has made of its paths."""
    try:
        yield
    except DatasetError as error:
        changed = [
            f'{key}={options[key]} -> "{path_map(options[key])}"'
            for key in PATH_OPTIONS
            if key in options and path_map(options[key]) != options[key]
        ]
        if not changed:
            raise
        raise type(error)(f"{error}; the path map changed {', '.join(changed)}") from error
