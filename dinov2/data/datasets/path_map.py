"""Rewriting of paths that were recorded on another machine."""

from dataclasses import dataclass

from dinov2.errors import DatasetError


@dataclass(frozen=True)
class PathMap:
    """Replaces the beginning or a part of recorded paths.

    Attributes:
        prefixes: pairs (old, new); the first whose old folder a path starts with is replaced.
        parts: pairs (old, new) replaced anywhere, after the prefix.
    """

    prefixes: tuple[tuple[str, str], ...] = ()
    parts: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "PathMap":
        """Read ``/old=/new,/other=/elsewhere``.

        Raises:
            DatasetError: a pair lacks one side.
        """
        pairs = [pair.partition("=") for pair in text.split(",") if pair]
        for old, _, new in pairs:
            if not old or not new:
                raise DatasetError(f'the path_map is "{text}"; write it as /old=/new,/other=/elsewhere')
        return cls(prefixes=tuple((old.rstrip("/"), new.rstrip("/")) for old, _, new in pairs))

    def __call__(self, path: str) -> str:
        """Return where a recorded path lies here."""
        for old, new in self.prefixes:
            if path == old or path.startswith(old + "/"):
                path = new + path[len(old) :]
                break
        for old, new in self.parts:
            path = path.replace(old, new)
        return path


# What the forks tied to the names of their machines; any other sshid changes nothing.
SSHID_PATH_MAPS = {
    "11": PathMap(prefixes=(("/data", "/nfs/data13"), ("/nfs/data11", "/data"))),
    "448": PathMap(parts=(("/20x_224px_0px_overlap/", "/40x_448px_0px_overlap/"),)),
}
