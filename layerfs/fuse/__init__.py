"""Carries FUSE requests to `vfs` through pyfuse3."""

from layerfs.fuse.quick import import_quickly

# Before any module of the package imports them in full.
import_quickly()
