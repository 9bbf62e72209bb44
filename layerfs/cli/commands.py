"""The list of commands. Imports nothing: it is read before it is known what will be needed."""

#: Command -> what the list of commands says of it. Its module in layerfs.cli has the same name, or the one in
#: MODULES, and holds `command`.
COMMANDS = {
    "mount": "Stack layers and mount them.",
    "umount": "Unmount, and wait until everything is on disk.",
    "diff": "Show what the upper directory changes.",
    "commit": "Make a layer tarball of the upper directory.",
    "apply": "Apply layer tarballs to a directory.",
    "inspect": "Show what an image is.",
    "history": "Show how an image was made.",
    "squash": "Join layers into one.",
    "export": "Write a mount or an image as one flat tar.",
    "import": "Make an image of a flat tar.",
    "stat": "Show what a running mount has done, and does.",
    "flatten": "Make an upper plain, for overlays that know no redirects.",
    "doctor": "Tell what this machine and kernel allow.",
}
#: Modules that cannot have their command's name.
MODULES = {"import": "importing"}
