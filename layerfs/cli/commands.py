"""The list of commands. Imports nothing: it is read before it is known what will be needed."""

#: Command -> what the list of commands says of it. Its module in layerfs.cli has the same name and holds
#: `command`.
COMMANDS = {
    "mount": "Stack layers and mount them.",
    "umount": "Unmount, and wait until everything is on disk.",
    "diff": "Show what the upper directory changes.",
    "commit": "Make a layer tarball of the upper directory.",
    "apply": "Apply layer tarballs to a directory.",
    "flatten": "Make an upper plain, for overlays that know no redirects.",
    "doctor": "Tell what this machine and kernel allow.",
}
