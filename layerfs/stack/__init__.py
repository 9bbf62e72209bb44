"""Lower layers, the names in them, and how directories of several layers become one.

Reads only. Nothing here knows of nodes, FUSE or the upper's writing side; all functions may run in worker
threads.
"""

from layerfs.stack.layer import Layer, LowerDir, Stack, read_link
from layerfs.stack.merge import Entry, Merged, merge_directory
from layerfs.stack.resolve import Marks, data_source, lower_directories, own_redirect, read_marks

__all__ = [
    "Entry",
    "Layer",
    "LowerDir",
    "Marks",
    "Merged",
    "Stack",
    "data_source",
    "lower_directories",
    "merge_directory",
    "own_redirect",
    "read_link",
    "read_marks",
]
