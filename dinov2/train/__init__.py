"""Self-supervised training: the objective's networks, the loop and its entry point.

Names are resolved on first use, so that the entry point can refuse a wrong configuration before torch is
imported.
"""

from typing import Any

__all__ = ["SSLMetaArch", "get_args_parser", "main"]


def __getattr__(name: str) -> Any:
    if name == "SSLMetaArch":
        from dinov2.train.ssl_meta_arch import SSLMetaArch

        return SSLMetaArch
    if name == "get_args_parser":
        from dinov2.train.arguments import get_args_parser

        return get_args_parser
    if name == "main":
        from dinov2.train.train import main

        return main
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
