"""One mount, from opening the layers to letting go of them."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import pyfuse3
import trio

import layerfs
from layerfs import gate
from layerfs.control import server
from layerfs.errors import MountError
from layerfs.fdutil import RESOLVE_INSIDE, fd_path, syncfs
from layerfs.fuse.adapter import Operations
from layerfs.fuse.bounded import Bounded
from layerfs.fuse.controls import Controls
from layerfs.fuse.extra import Extra
from layerfs.fuse.statistics import Choice, Reporter
from layerfs.gate import passthrough
from layerfs.overlay.names import XattrNames
from layerfs.stack import Stack
from layerfs.upper.upper import Upper
from layerfs.vfs import checks
from layerfs.vfs.caller import sees_callers
from layerfs.vfs.config import StackConfig
from layerfs.vfs.prefix import find_prefix
from layerfs.vfs.unload import Unload
from layerfs.vfs.vfs import Vfs

log = logging.getLogger("layerfs.fuse")


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
    native = _native_gate(config, stack)
    if config.passthrough:
        _pass_through(native, stack, upper)
    if native is not None and _may_be_idmapped(fuse_options):
        native.allow_idmapped()
    reporter = Reporter(_choice(config, native))
    operations = Operations(_describer(config, stack, upper, prefix, native, reporter), reporter.counters)
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
        if native is not None and not native.hooked:
            if config.gate:
                asked = _asked(config)
                raise MountError(
                    f"{asked}: this libfuse does not let the native gate in (3.13 or later does)"
                )
            log.info("no native gate: libfuse does not let it in")
            native = None
            reporter.choice = _choice(config, None)
        operations.masks = native is not None
        trio.run(
            _main,
            operations,
            stack,
            upper,
            config,
            native,
            control,
            reporter,
            ready,
            instruments=[_Look(native)] if native is not None else [],
        )
    finally:
        if native is not None:
            native.close()
        # As an ordinary user libfuse waits for fusermount3, and a signal would end that wait before the mount
        # is gone.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        pyfuse3.close(unmount=True)
        _finish(upper)


class _Look(trio.abc.Instrument):
    """Has the gate look for the next request before the event loop sleeps: waking up takes longer."""

    def __init__(self, native: Any) -> None:
        self._look = native.look

    def before_io_wait(self, timeout: float) -> None:
        if timeout > 0:
            self._look()


async def _main(
    operations: Operations,
    stack: Stack,
    upper: Upper | None,
    config: StackConfig,
    native: Any,
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
            gate=native,
            unasked=max(16, _pool_capacity() // 2) if native is not None and not config.passthrough else 0,
            passthrough=config.passthrough,
        )
        bounded = None
        if native is not None:
            native.on_let_go = operations.vfs.tree.let_go
            native.on_opendir = operations.vfs.files.open_loaded
            native.on_releasedir = operations.vfs.files.release_directory
            extra = Extra(operations.vfs, native.reply, operations.counters, native.again)
            native.on_carry = lambda frame: nursery.start_soon(extra.handle, frame)
            native.carries(True)
            native.mind(_epoll())
            unload = Unload(operations.vfs.tree, config.max_names)
            bounded = Bounded(unload, native, operations.counters)
            nursery.start_soon(bounded.run)
        reporter.vfs = operations.vfs
        operations.vfs.tree.attributes_moved = operations.attributes_moved
        await operations.vfs.start()
        await nursery.start(_end_on_signal, operations, bounded)
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


def _epoll() -> int:
    """The descriptor that the event loop sleeps on, in which the device is disarmed while its reader runs; -1
    where this trio keeps it somewhere else."""
    try:
        from trio._core._run import GLOBAL_RUN_CONTEXT

        return int(GLOBAL_RUN_CONTEXT.runner.io_manager._epoll.fileno())
    except (ImportError, AttributeError):
        return -1


async def _end_on_signal(
    operations: Operations, bounded: Bounded | None, task_status: trio.TaskStatus[None]
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        ending = False
        async for _ in signals:  # until the mount is gone: a second signal must not cut the sync short
            if not ending:
                ending = True
                operations.vfs.give_up()
                if bounded is not None:
                    await bounded.end()
                pyfuse3.terminate()


def _finish(upper: Upper | None) -> None:
    """Nothing of a FUSE mount is synced by the kernel when it goes: the daemon does it (overlayfs does in
    ovl_put_super).
    """
    if upper is None:
        return
    server.remove(upper.work.state.fd)
    upper.work.drop_parked()
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


def _native_gate(config: StackConfig, stack: Stack) -> Any:
    """None: Python answers everything. Raises MountError."""
    if config.gate is False:
        return None
    native = gate.make(
        _pool_capacity(),
        RESOLVE_INSIDE,
        statfs=stack.layers[0].fd.fd,
        xattrs=config.xattrs,
        read_only=config.read_only or stack.upper is None,
        openless=not config.passthrough,
    )
    if native is not None:
        native.arm()
    elif config.gate:
        raise MountError(f"{_asked(config)}: there is no native gate: {gate.unavailable}")
    return native


def _asked(config: StackConfig) -> str:
    """The option that takes the gate."""
    return "data=passthrough" if config.passthrough else "gate=on"


def _pass_through(native: Any, stack: Stack, upper: Upper | None) -> None:
    """Raises MountError."""
    obstacle: str | None
    if upper is not None and upper.overrides:
        obstacle = "not where the upper directory keeps modes in xattrs: the kernel would not clear setuid"
    else:
        obstacle = passthrough.obstacle()
    if obstacle is not None:
        raise MountError(f"data=passthrough: {obstacle}")
    passed = [layer for layer in stack.layers if upper is None or layer is stack.upper]
    native.pass_through(passthrough.stack_depth(fd_path(layer.fd.fd) for layer in passed))


def _may_be_idmapped(fuse_options: set[str]) -> bool:
    """Whether idmapped mounts may be made of the mount: most requests do not say then who makes them. Not
    where /proc could not say it in their place. (With allow_root, which libfuse holds by every request's uid,
    there is no gate: `cli.launching`.) Without default_permissions the kernel would end the connection."""
    return sees_callers() and "default_permissions" in fuse_options


def _choice(config: StackConfig, native: Any) -> Choice:
    """What `layerfs stat` says of how requests are answered."""
    if native is None:
        why = (
            "switched off" if config.gate is False else gate.unavailable or "this libfuse does not let it in"
        )
        return Choice("python", "pyfuse3 alone answers: there is no gate", False, why)
    if config.passthrough:
        why = "asked for; files of the upper directory, all where nothing can be written; others are cached"
        return Choice("passthrough", why, True, "it was built, and libfuse lets it in")
    why = "the kernel keeps pages and opens files without asking; the gate reads, and writes what is small"
    return Choice("cached", why, True, "it was built, and libfuse lets it in")


def _describer(
    config: StackConfig,
    stack: Stack,
    upper: Upper | None,
    prefix: str,
    native: Any,
    reporter: Reporter,
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
        if name == "layerfs.gate":
            return b"on" if native is not None and native.hooked else b"off"
        if name == "layerfs.stat":
            return json.dumps(reporter.report()).encode()
        kind, _, number = name.rpartition(".")
        if kind == "layerfs.lower" and number.isdigit() and int(number) < len(stack.lowers):
            return os.fsencode(stack.lowers[int(number)].path)
        return None

    return describe
