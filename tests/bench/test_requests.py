"""The text of a trace becomes counts. That a kernel writes it so is shown by the short run."""

from __future__ import annotations

import os

from benchmarks.fsbench.requests import connection, counted

TRACE = """\
# tracer: nop
#
# entries-in-buffer/entries-written: 5/5   #P:2
#
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
              ls-4242    [001] .....  100.000001: fuse_request_send: connection 60 req 2 opcode 1 (FUSE_LOOKUP) len 47 \n\
       fuse_1 x-4243     [000] .....  100.000002: fuse_request_send: connection 60 req 4 opcode 1 (FUSE_LOOKUP) len 47 \n\
              ls-4242    [001] .....  100.000003: fuse_request_send: connection 60 req 6 opcode 44 (FUSE_READDIRPLUS) len 80 \n\
              cp-4242    [001] .....  100.000004: fuse_request_send: connection 60 req 8 opcode 53 (0x35) len 96 \n\
              cp-4242    [001] .....  100.000005: fuse_request_send: connection 60 req 8 opcode 99 (0x63) len 96 \n\
              cp-4242    [001] .....  100.000006: fuse_request_end: connection 60 req 8 len 16 error 0 \n"""  # noqa: E501


def test_counts_by_kind() -> None:
    counts = {"LOOKUP": 2, "READDIRPLUS": 1, "COPY_FILE_RANGE_64": 1, "99": 1}
    assert counted(TRACE.splitlines()) == counts
    assert counted([]) == {}


def test_connection_is_the_kernels_device_number() -> None:
    assert connection(os.makedev(0, 60)) == 60
    assert connection(os.makedev(8, 1)) == 8 << 20 | 1
