"""What a running mount does for whoever asks on its control socket: see `layerfs.control.wire` for the
questions, `layerfs.vfs.hold` for what holding means. No sockets here."""

from __future__ import annotations

import os
from typing import Any

from layerfs.fuse.statistics import Reporter
from layerfs.vfs.node import Node
from layerfs.vfs.vfs import Vfs


class Controls:
    """One connection."""

    def __init__(self, vfs: Vfs, reporter: Reporter) -> None:
        self._vfs = vfs
        self._reporter = reporter
        self._session = vfs.hold.session()

    def end(self) -> None:
        self._session.end()

    async def answer(self, op: str, request: dict[str, Any]) -> dict[str, Any]:
        """Raises LookupError, TypeError, ValueError, OSError."""
        if op == "ping":
            return {}
        if op == "writing":
            files = self._vfs.files
            return {
                "inodes": sorted(node.real for node in files.open_for_writing()),
                "passed": sorted(node.real for node in files.written_past_us()),
            }
        if op == "hold":
            return {"found": self._expect(int(request["node"]), int(request["inode"]))}
        if op == "held":
            return {"held": await self._session.wait_closed(int(request["node"]))}
        if op == "release":
            self._session.open(int(request["node"]))
            return {}
        if op == "pause":
            return await self._pause()
        if op == "paused":
            await self._session.hold_all()
            return {}
        if op == "stat":
            return dict(self._reporter.report())
        raise LookupError(op)

    def _expect(self, id: int, inode: int) -> bool:
        node = self._vfs.tree.nodes.get(id)  # type: ignore[call-overload]  # any number may be asked for
        if node is None or not node.in_upper or node.real != inode:
            return False
        self._session.expect(id)
        return True

    async def _pause(self) -> dict[str, Any]:
        await self._session.hold_opens()
        found = [
            node
            for node in self._vfs.files.open_for_writing()
            if not node.unlinked and node.id not in self._session.closed
        ]
        for node in found:
            self._session.expect(node.id)
        paths = [os.fsdecode(self._path(node)) for node in found]
        return {"open": paths, "nodes": [node.id for node in found]}

    def _path(self, node: Node) -> bytes:
        assert node.parent is not None
        above = self._vfs.tree.path(node.parent)
        return above + b"/" + node.name if above else node.name
