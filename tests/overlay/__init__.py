"""An upper directory is shared with kernel overlayfs: both ways, on every file system, in every option."""
