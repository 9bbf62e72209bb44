"""The merged tree: nodes, names, merge rules, copy-up, whiteouts, rename. Knows nothing of FUSE.

Who does what:
    tree        nodes, loading of directories, numbers, attributes (reads only)
    copyup      bringing objects into the upper, once, whoever asks
    links       all names of a hard-linked lower file
    names       what every change of names needs
    namespace   create, link, unlink
    rename      rename
    files       handles, data
    attributes  setattr, xattrs
    inode_flags what chattr(1) sets
    setid       what writing takes from the mode

All state is touched on the event loop's thread only. Every operation has two halves: *prepare* may await
(load directories, copy data), and
*commit* runs without an await, after checking again what prepare found. So no lock is held over an await, and
no order of requests can see half of a change.
"""
