"""Starting, watching and ending the process that serves a mount."""
