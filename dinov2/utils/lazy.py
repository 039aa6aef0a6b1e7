"""Packages whose names are loaded when they are first asked for (PEP 562), so that tools start quickly."""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, namespace: dict[str, Any], homes: dict[str, str], modules: Iterable[str] = ()
) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package.

    Args:
        package: its name.
        namespace: its ``globals()``; what has been loaded is kept there.
        homes: public name -> module of the package that defines it. These modules are attributes as well, as
            they are of a package that imports them.
        modules: further modules that are attributes.
    """
    modules = {*homes.values(), *modules}

    def load(name: str) -> Any:
        if name in homes:
            namespace[name] = getattr(import_module(f"{package}.{homes[name]}"), name)
            return namespace[name]
        if name in modules:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load
