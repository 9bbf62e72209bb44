"""A mount as the root of chroot, runc, crun, bwrap, systemd-nspawn and pivot_root(2); the control is a plain
directory.
"""
