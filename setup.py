"""The one part that is compiled: the native gate. Without a compiler everything else is installed all the
same, and mounts go without it (`layerfs doctor` says so)."""

from setuptools import Extension, setup

_C = ["map", "facts", "files", "workers", "answer", "backing", "hook"]


def _extensions() -> list[Extension]:
    gate = Extension(
        "layerfs.gate.native",
        ["layerfs/gate/native.pyx", *(f"layerfs/gate/{name}.c" for name in _C)],
        depends=["layerfs/gate/core.h"],
        include_dirs=["layerfs/gate"],
        libraries=["dl", "pthread"],
        extra_compile_args=["-O2", "-Wall", "-Wextra"],
        optional=True,
    )
    try:
        from Cython.Build import cythonize
    except ImportError:
        return []
    return cythonize([gate], language_level=3)


setup(ext_modules=_extensions())
