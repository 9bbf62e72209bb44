"""Imports trio and pyfuse3 without those parts of them that no mount uses. Nothing else depends on it: where
the libraries look different one day it saves less, or nothing.

Importing the two is most of the time that a mount takes to start. Of some 125 ms of it (CPU time, Python
3.11, a loaded machine, 2026-11-23) DTLS and TLS with OpenSSL under them are 11, and `importlib.metadata` with
the parser for e-mail, which pyfuse3 asks for its own version alone, another 9.

Nothing may be put off until it is needed: the mount may lie over the very directory that it would be imported
from, and the daemon would wait for itself.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NoReturn

from layerfs import gate

#: Modules of trio that only other modules of these, and nothing in `trio` but its list of names, refer to.
_UNUSED = ("trio._dtls", "trio._ssl", "trio._highlevel_ssl_helpers")
_METADATA = "importlib.metadata"


def import_quickly() -> None:
    """Does nothing when trio is there already: others may use all of it."""
    if "trio" in sys.modules:
        gate.import_pyfuse3()
        return
    placed = []
    for name in (*_UNUSED, _METADATA):
        if name not in sys.modules:
            sys.modules[name] = _Metadata(name) if name == _METADATA else _Unused(name)
            placed.append(name)
    try:
        gate.import_pyfuse3()  # into sys.modules, from where all others take them
        import trio  # noqa: F401
    finally:
        for name in placed:  # whoever asks for them later gets the real ones
            sys.modules.pop(name, None)


class _Unused(ModuleType):
    """Has every name, each a class that cannot be used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__new__": _refuse, "__module__": self.__name__})


def _refuse(cls: type, *_: object, **__: object) -> NoReturn:
    raise NotImplementedError(f"{cls.__module__}.{cls.__name__} was left out of this process: {__file__}")


class _Metadata(ModuleType):
    """As if nothing were installed: pyfuse3 then knows no version of its own."""

    class PackageNotFoundError(ModuleNotFoundError):
        pass

    @staticmethod
    def version(distribution_name: str) -> str:
        raise _Metadata.PackageNotFoundError(distribution_name)
