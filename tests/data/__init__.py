"""Ways of the bytes of files other than the default."""
