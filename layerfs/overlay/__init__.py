"""The on-disk formats of layers: codecs only, no walking and no policy. FORMAT.md is the page of record."""
