"""layers in and out: tar, changes, commit, apply, against laws, tables of evil tars, and other tools."""
