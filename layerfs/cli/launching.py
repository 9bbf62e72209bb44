"""What `layerfs mount` and `mount.layerfs` share: from mount options to a running daemon. Parses no command
line.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from layerfs.errors import MountError, UsageError
from layerfs.runtime.daemon import Daemon, MountRequest, Serve, fork_daemon, run_foreground
from layerfs.vfs.config import StackConfig

if TYPE_CHECKING:
    from layerfs.overlay.options import MountOptions

#: The daemon that `daemon_ahead` forked, until it is known to live on.
_ahead: Daemon | None = None
#: A work directory that was made for this mount, until the mount is usable.
_made: str | None = None


def load_serve() -> Serve:
    from layerfs.fuse.serve import serve

    return serve


@contextmanager
def daemon_ahead() -> Iterator[None]:
    """Fork the daemon now, to be used by `mount` inside; ended if that did not come to a mount."""
    global _ahead
    _ahead = fork_daemon(load_serve)
    try:
        # Not by an exception: raised in the middle of an import it may be lost, with a complaint on stderr.
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _undo_and_exit)
        yield
    finally:
        _undo()


def _undo() -> None:
    global _ahead, _made
    daemon, _ahead = _ahead, None
    if daemon is not None:
        daemon.abandon()
    made, _made = _made, None
    if made is not None:
        import shutil

        shutil.rmtree(made, ignore_errors=True)


def _undo_and_exit(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    _undo()
    os._exit(128 + number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Work that cleans up after itself: inside, SIGINT and SIGTERM are exceptions, and end the process after
    it."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    arrived: list[int] = []

    def stop(number: int, frame: object) -> None:
        if not arrived:  # a second one must not cut the cleaning up short
            arrived.append(number)
            raise KeyboardInterrupt

    try:
        for number in numbers:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, stop)
        yield
    finally:
        if arrived:
            _undo_and_exit(arrived[0], None)
        for number in numbers:
            signal.signal(number, before[number])


def mount(
    *,
    options: MountOptions,
    mountpoint: str,
    ephemeral: bool = False,
    foreground: bool = False,
    fake: bool = False,
    log: str | None = None,
    source: str | None = None,
    image: Callable[[], list[str]] | None = None,
    note: Callable[[str], None],
) -> None:
    """Check and mount. Exits with 0 when the mount is usable; returns with `foreground` when it has ended.

    `fake`: check only. `image` gives further lower layers, to lie below those of `options`; it is called when
    all else is known to be right, as it may take long. Raises LayerfsError.
    """
    global _ahead
    from layerfs.overlay.options import kernel_mount_options
    from layerfs.runtime import predecessor, preflight
    from layerfs.runtime.mounts import absolute
    from layerfs.vfs.checks import check_stack

    if ephemeral and (options.upper or options.work):
        raise UsageError("--ephemeral makes its own upper and work directory: leave out --upper and --work")
    if options.work and not options.upper:
        raise UsageError("a work directory needs an upper directory")
    if options.passthrough and options.gate is False:
        raise UsageError("data=passthrough: it takes the native gate, which is switched off")
    # libfuse holds it by looking whose each request is: what is answered before, or opened without asking,
    # would be everybody's.
    without_gate = "allow_root" in options.fuse
    if without_gate and options.gate:
        raise UsageError(
            "allow_root goes without the native gate: leave out gate=on and data=, or allow_root"
        )
    lowers = [absolute(lower) for lower in options.lowers]
    if options.owners:
        from layerfs.runtime.idmapped import without_idmaps

        lowers = without_idmaps(lowers)
    config = StackConfig(
        lowers=tuple(lowers),
        upper=absolute(options.upper) if options.upper else None,
        work=absolute(options.work) if options.work else None,
        volatile=options.volatile or ephemeral,
        redirect_dir=options.redirect_dir is not False,
        metacopy=options.metacopy is not False,
        userxattr=options.userxattr,
        read_only=options.read_only,
        owners=options.owners,
        xattr_permissions=options.xattr_permissions,
        xattrs=options.xattrs,
        acl=options.acl,
        gate=False if without_gate else options.gate,
        passthrough=options.passthrough,
        max_names=options.max_names or StackConfig.max_names,
    )
    fuse_options, notes = kernel_mount_options(
        options,
        root=os.geteuid() == 0,
        read_only=config.read_only or not (config.upper or ephemeral),
        labels=os.path.exists("/sys/fs/selinux/enforce"),
        source=source,
    )
    for line in notes:
        note(line)
    preflight.check_fuse_device()
    preflight.check_user_mount(fuse_options)
    device_before, cleared = preflight.check_mountpoint(mountpoint)
    if cleared:
        note(f"a dead mount was cleared off {mountpoint}")
    if image is not None:
        config = replace(config, lowers=(*config.lowers, *image()))
    if config.upper is not None and config.work is None and not config.read_only:
        config = _with_default_work(config)
    try:
        if config.work is not None and not config.read_only:
            predecessor.wait_until_gone(config.work)
        check_stack(config, mountpoint)
        if fake:
            return
        request = MountRequest(
            config=config,
            mountpoint=absolute(mountpoint),
            device_before=device_before,
            fuse_options=fuse_options,
            ephemeral=ephemeral,
            log=absolute(log) if log else None,
        )
        if foreground:
            run_foreground(load_serve, request, _keep_work)
            return
        _ahead = _ahead or fork_daemon(load_serve)
        _ahead.start(request)
        _ahead.keep_and_exit()
    finally:
        _undo()


@contextmanager
def work_directory(config: StackConfig) -> Iterator[StackConfig]:
    """`config` with a work directory for as long as this takes: the default one is made if need be, and
    unmade. Raises MountError.
    """
    if config.work is None:
        config = _with_default_work(config)
    try:
        yield config
    finally:
        _undo()


def _keep_work() -> None:
    global _made
    _made = None


def _with_default_work(config: StackConfig) -> StackConfig:
    """`config` with the work directory `UPPER.work`, made if need be (`_undo` unmakes it). Raises
    MountError.
    """
    global _made
    assert config.upper is not None
    work = config.upper.rstrip("/") + ".work"
    if os.path.isdir(config.upper):  # else the checks say what it is
        try:
            os.mkdir(work, 0o700)
            _made = work
        except FileExistsError:
            pass
        except OSError as error:
            raise MountError(
                f"work directory {work}: {os.strerror(error.errno or 0)} (--work DIR names another)",
                error.errno,
            ) from None
    return replace(config, work=work)
