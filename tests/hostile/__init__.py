"""Evil layers, layers that change or die under a mount, and mounts in and over each other."""
