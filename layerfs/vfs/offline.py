"""Work on an upper that is not mounted: the stack opened, locked and recovered as for a mount, and nothing
served.
"""

from __future__ import annotations

import trio

from layerfs.errors import MountError
from layerfs.fdutil import syncfs
from layerfs.overlay.names import XattrNames
from layerfs.stack import Stack
from layerfs.upper.upper import Upper
from layerfs.vfs import checks
from layerfs.vfs.config import StackConfig
from layerfs.vfs.flatten import Flattened
from layerfs.vfs.prefix import find_prefix
from layerfs.vfs.vfs import Vfs

#: Descriptors of directories to keep.
_POOL = 256


def flatten(config: StackConfig) -> Flattened:
    """Makes the upper plain (`vfs.flatten`) and syncs it. Raises LayerfsError, BusyError while it is
    mounted.
    """
    checks.check_stack(config)
    assert config.upper is not None and config.work is not None, "checked"
    try:
        names = XattrNames(find_prefix(config))
        stack = Stack(config.lowers, config.upper, names, _POOL)
        assert stack.upper is not None
        upper = Upper(stack.upper, config.work, names, volatile=False)
        done = trio.run(_flatten, stack, upper)
        upper.work.empty()
        syncfs(upper.root.fd)
        return done
    except (OSError, BaseExceptionGroup) as raised:
        error = _first(raised)
        if not isinstance(error, OSError):
            raise error from None
        where = f" at {checks.shown(error.filename)}" if error.filename else ""
        raise MountError(
            f"upper directory {checks.shown(config.upper)}{where}: {checks.reason(error)}", error.errno
        ) from None


def _first(error: BaseException) -> BaseException:
    """What a nursery wrapped."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _flatten(stack: Stack, upper: Upper) -> Flattened:
    async with trio.open_nursery() as nursery:
        vfs = Vfs(stack, upper, nursery)
        await vfs.start()
        return await vfs.flatten()
    raise AssertionError("a nursery hides nothing")
