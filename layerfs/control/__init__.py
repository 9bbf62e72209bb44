"""Asks running mounts about themselves. Starts and ends none (that is `layerfs.runtime`)."""
