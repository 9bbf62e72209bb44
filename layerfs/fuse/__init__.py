"""Carries FUSE requests to `vfs` through pyfuse3."""
