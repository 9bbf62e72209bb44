"""Every order in which requests can meet inside `layerfs.vfs`, tried without a mount (see `scheduler`)."""
