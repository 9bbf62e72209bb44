"""One mount, from opening the layers to letting go of them."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
from collections.abc import Callable

import pyfuse3
import trio

import layerfs
from layerfs.control import server
from layerfs.errors import MountError
from layerfs.fdutil import syncfs
from layerfs.fuse.adapter import Operations
from layerfs.fuse.controls import Controls
from layerfs.fuse.statistics import Choice, Reporter
from layerfs.overlay.names import XattrNames
from layerfs.stack import Stack
from layerfs.upper.upper import Upper
from layerfs.vfs import checks
from layerfs.vfs.config import StackConfig
from layerfs.vfs.prefix import find_prefix
from layerfs.vfs.vfs import Vfs

log = logging.getLogger("layerfs.fuse")

_CHOICE = Choice(
    data="python",
    data_why="pyfuse3 alone answers: there is no gate",
    gate=False,
    gate_why="this version has none",
)


def serve(
    config: StackConfig,
    mountpoint: str,
    fuse_options: set[str],
    ready: Callable[[], None],
) -> None:
    """Mounts, calls `ready` when the kernel knows the mount and requests are about to be answered, and
    returns after it was unmounted (umount, SIGTERM, SIGINT) and the upper synced. Raises LayerfsError before
    anything is mounted.
    """
    os.umask(0)
    checks.check_stack(config, mountpoint)
    prefix = find_prefix(config)
    names = XattrNames(prefix)
    permissions = config.xattr_permissions
    stack = Stack(config.lowers, config.upper, names, _pool_capacity(), xattr_permissions=permissions)
    upper = None
    if stack.upper is not None and not config.read_only:
        assert config.work is not None, "checked"
        upper = Upper(stack.upper, config.work, names, volatile=config.volatile)
    reporter = Reporter(_CHOICE)
    operations = Operations(_describer(config, stack, upper, prefix, reporter), reporter.counters)
    operations.enable_acl = config.acl
    control = server.bind(upper.work.state.fd) if upper is not None else None
    try:
        pyfuse3.init(operations, mountpoint, fuse_options)
    except RuntimeError as error:
        if upper is not None:
            server.remove(upper.work.state.fd)
            if upper.volatile:
                upper.work.clear_volatile()  # nothing was written
        raise MountError(f"cannot mount on {mountpoint}: {error}") from error
    try:
        trio.run(_main, operations, stack, upper, config, control, reporter, ready)
    finally:
        # As an ordinary user libfuse waits for fusermount3, and a signal would end that wait before the mount
        # is gone.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        pyfuse3.close(unmount=True)
        _finish(upper)


async def _main(
    operations: Operations,
    stack: Stack,
    upper: Upper | None,
    config: StackConfig,
    control: socket.socket | None,
    reporter: Reporter,
    ready: Callable[[], None],
) -> None:
    async with trio.open_nursery() as nursery:
        operations.vfs = Vfs(
            stack,
            upper,
            nursery,
            redirect_dir=config.redirect_dir,
            metacopy=config.metacopy,
            owners=config.owners,
            xattrs=config.xattrs,
        )
        reporter.vfs = operations.vfs
        operations.vfs.tree.attributes_moved = operations.attributes_moved
        await operations.vfs.start()
        await nursery.start(_end_on_signal, operations)
        if control is not None:
            nursery.start_soon(server.serve, control, lambda: Controls(operations.vfs, reporter))
        ready()
        # No limit on requests under way: a hundred that wait for copy-ups must not keep others out.
        try:
            await pyfuse3.main(max_tasks=1 << 20)
        except* ConnectionAbortedError:
            # What an aborted connection reads (umount -f, /sys/fs/fuse/connections/N/abort), and now and then
            # one that is unmounted while requests are under way, where ENODEV is the rule: the end of the
            # mount either way.
            log.info("the kernel ended the connection")
        operations.vfs.give_up()
        nursery.cancel_scope.cancel()


async def _end_on_signal(operations: Operations, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        ending = False
        async for _ in signals:  # until the mount is gone: a second signal must not cut the sync short
            if not ending:
                ending = True
                operations.vfs.give_up()
                pyfuse3.terminate()


def _finish(upper: Upper | None) -> None:
    """Nothing of a FUSE mount is synced by the kernel when it goes: the daemon does it (overlayfs does in
    ovl_put_super).
    """
    if upper is None:
        return
    server.remove(upper.work.state.fd)
    try:
        syncfs(upper.root.fd)
        if upper.volatile:
            upper.work.clear_volatile()
    except OSError as error:
        log.error("the upper could not be synced: %s", error.strerror)


def _pool_capacity() -> int:
    """Directory descriptors to keep: a quarter of what the process may open, the rest is for open files and
    pins.
    """
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(soft // 4, 4096))


def _describer(
    config: StackConfig, stack: Stack, upper: Upper | None, prefix: str, reporter: Reporter
) -> Callable[[str], bytes | None]:
    mount = json.dumps(
        {
            "pid": os.getpid(),
            "version": layerfs.__version__,
            "upper": stack.upper.path if stack.upper is not None else None,
            "work": os.path.realpath(upper.work.path) if upper is not None else None,
            "lowers": len(stack.lowers),
            "volatile": config.volatile,
            "xattr_prefix": prefix,
        }
    ).encode()

    def describe(name: str) -> bytes | None:
        if name == "layerfs.mount":
            return mount
        if name == "layerfs.stat":
            return json.dumps(reporter.report()).encode()
        kind, _, number = name.rpartition(".")
        if kind == "layerfs.lower" and number.isdigit() and int(number) < len(stack.lowers):
            return os.fsencode(stack.lowers[int(number)].path)
        return None

    return describe
