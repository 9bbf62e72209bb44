"""layerfs: read-only image layers under a writable directory, shown as one file system through FUSE.

This module holds the version alone: every command imports it, so it imports nothing.
"""

__version__ = "0.1.0"
