"""SQLite in WAL mode, written by several processes at once: shared memory, locks and fsync for real."""

from __future__ import annotations

import multiprocessing
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Place

pytestmark = [pytest.mark.long, pytest.mark.root, pytest.mark.timeout(600)]

WRITERS, TRANSACTIONS, ROWS = 4, 100, 10


def _open(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=120, isolation_level=None)


def _write(path: str, writer: int, journal: str, barrier: Callable[[], int]) -> None:
    db = _open(path)
    db.execute(f"PRAGMA journal_mode={journal}")
    barrier()
    for number in range(TRANSACTIONS):
        db.execute("BEGIN IMMEDIATE")
        for row in range(ROWS):
            db.execute("INSERT INTO entry VALUES (?, ?, ?)", (writer, number * ROWS + row, "x" * 200))
        db.execute("UPDATE total SET entries = entries + ?", (ROWS,))
        db.execute("COMMIT")
    db.close()


def _read(path: str, barrier: Callable[[], int]) -> None:
    """Every snapshot that a reader gets holds whole transactions only."""
    db = _open(path)
    barrier()
    seen = 0
    while seen < WRITERS * TRANSACTIONS * ROWS:
        db.execute("BEGIN")
        (entries,) = db.execute("SELECT count(*) FROM entry").fetchone()
        (total,) = db.execute("SELECT entries FROM total").fetchone()
        db.execute("COMMIT")
        assert entries == total >= seen, (entries, total, seen)
        seen = entries
    db.close()


@pytest.mark.parametrize("journal", ["WAL", "DELETE"])
def test_several_processes_write_one_database(place: Place, layer: Callable[[], Path], journal: str) -> None:
    """The database lies in a lower layer: its first change copies it up while others have it open."""
    lower = layer()
    db = _open(str(lower / "data.db"))
    db.execute(f"PRAGMA journal_mode={journal}")
    db.execute("CREATE TABLE entry (writer INT, number INT, data TEXT, PRIMARY KEY (writer, number))")
    db.execute("CREATE TABLE total (entries INT)")
    db.execute("INSERT INTO total VALUES (0)")
    db.close()

    mounted = place(lower)
    path = str(mounted.mnt / "data.db")
    context = multiprocessing.get_context("fork")  # no helper process that outlives the test
    barrier = context.Barrier(WRITERS + 1)
    workers = [
        context.Process(target=_write, args=(path, number, journal, barrier.wait))
        for number in range(WRITERS)
    ]
    workers.append(context.Process(target=_read, args=(path, barrier.wait)))
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join(400)
        assert [worker.exitcode for worker in workers] == [0] * len(workers)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    for _ in range(2):  # and once more after a remount
        db = _open(path)
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        counted = db.execute("SELECT writer, count(*), min(number), max(number) FROM entry GROUP BY writer")
        last = TRANSACTIONS * ROWS - 1
        assert counted.fetchall() == [(number, last + 1, 0, last) for number in range(WRITERS)]
        db.close()
        mounted.remount()
