"""The start of a mount imports less of trio and pyfuse3, and nobody else notices."""

from __future__ import annotations

import subprocess
import sys

LEFT_OUT = "('ssl', 'hmac', 'importlib.metadata', 'email', 'trio._dtls', 'trio._ssl')"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.strip()


def test_what_no_mount_uses_is_left_out() -> None:
    code = f"import sys, layerfs.fuse.serve; print([name for name in {LEFT_OUT} if name in sys.modules])"
    assert python(code) == "[]"


def test_the_real_ones_can_be_had_afterwards() -> None:
    code = (
        "import layerfs.fuse.serve, importlib.metadata, trio._ssl, ssl;"
        "assert importlib.metadata.version('trio'); print(trio._ssl.SSLStream.__name__)"
    )
    assert python(code) == "SSLStream"


def test_what_was_left_out_says_so() -> None:
    code = (
        "import layerfs.fuse.serve, trio\n"
        "try:\n    trio.SSLStream(None, None)\nexcept NotImplementedError as error:\n    print(error)"
    )
    assert "SSLStream was left out of this process" in python(code)


def test_who_has_trio_keeps_all_of_it() -> None:
    code = "import trio, layerfs.fuse.serve; print(trio.SSLStream.__module__)"
    assert python(code) == "trio"


def test_trio_runs() -> None:
    code = (
        "import layerfs.fuse.serve, trio\n"
        "async def main():\n"
        "    with trio.move_on_after(0.01):\n        await trio.sleep_forever()\n"
        "    return await trio.to_thread.run_sync(lambda: 'ran')\n"
        "print(trio.run(main))"
    )
    assert python(code) == "ran"
