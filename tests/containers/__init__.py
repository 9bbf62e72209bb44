"""Containers' own programs, podman and buildah, on stores whose mount program is layerfs."""
