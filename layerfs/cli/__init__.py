"""The command line: one module per command. Parsing and talking only; the work is done below."""
