"""Inode numbers and the table of nodes the kernel knows."""
