"""OCI layers: tar in and out, what an upper changed, commit and apply. No mounts, no FUSE, no command
line."""
