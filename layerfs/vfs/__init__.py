"""The merged tree: nodes, names, merge rules, copy-up, whiteouts, rename. No FUSE in here."""
