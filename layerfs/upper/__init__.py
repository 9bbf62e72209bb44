"""The one writable directory: copy-up, whiteouts, the work directory. Knows descriptors and names, not nodes.

FORMAT and order of writes: layerfs/overlay/FORMAT.md. Every step that a crash may follow is named in `steps`.
"""
