"""Layers that lie in other stacked file systems or in images, and other stacks that lie on layerfs."""
