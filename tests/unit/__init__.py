"""Small exact tests of the parts, none of them over a FUSE mount."""
