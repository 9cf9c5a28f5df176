"""One file a published system. A new file in this folder is a new method; nothing else needs to name it."""

import importlib
import pkgutil

from .base import Method


def _discover() -> dict[str, type[Method]]:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return {method.name: method for method in sorted(Method.__subclasses__(), key=lambda m: m.name)}


METHODS = _discover()

__all__ = ["METHODS", "Method"]
