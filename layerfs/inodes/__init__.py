"""Inode numbers."""
