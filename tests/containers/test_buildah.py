"""buildah on layerfs makes the images that it makes on fuse-overlayfs and without any overlay (vfs)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.containers.conftest import CAP_NET_RAW, MakeStore
from tests.containers.store import Layer, assert_same_layers, why_not

pytestmark = [pytest.mark.root, pytest.mark.timeout(300)]

#: Every RUN is a layer (`--layers`). What a line is there for is beside it.
DOCKERFILE = f"""\
FROM scratch AS base
ADD base.tar /

FROM base AS first
COPY --chown=5:6 files /work
RUN rm -r /srv/old/deep && rm /srv/gone
RUN mv /srv/old /srv/renamed && mkdir /srv/old && echo fresh >/srv/old/file
RUN chown -R 7:8 /work && chown -h 9:9 /work/link && chmod 4755 /work/tool
RUN ln /work/tool /work/tool2 && ln /srv/first /srv/third
RUN chmod 600 /srv/big
RUN echo more >>/srv/second
RUN xattr /work/tool security.capability {CAP_NET_RAW} && xattr /work/note user.mark 00ff0a
RUN mkfifo /work/fifo && mkdir -m 3775 /work/sticky && ln -sf /nowhere /work/dangling
RUN rm -r /work/tree && mkdir /work/tree && echo again >/work/tree/one
RUN mv /work/tree/one /work/one && rmdir /work/tree && mv /work/one /work/tree
RUN rm -rf /home && mv /srv/renamed /home
RUN touch /tmp/same && rm /tmp/same
RUN dd if=/dev/zero of=/work/holes bs=1 count=1 seek=1000000 2>/dev/null
RUN cp -a /work /copy && rm -rf /copy/tree /copy/sub && mv /copy/note "/copy/a name: with, signs"

FROM base AS second
COPY --from=first /work /got
COPY --from=first /srv/first /srv/third /got/
RUN rm /srv/big && mv /got/sub /srv/sub && echo done >/srv/sub/done
"""

SHORT = f"""\
FROM scratch AS base
ADD base.tar /
FROM base
COPY files /work
RUN rm -r /srv/old/deep /srv/gone && mv /work/sub /work/renamed && mv /srv/old /home/moved \
 && chmod 600 /srv/big && chown 7:8 /work/note && chmod 4755 /work/tool && ln /work/tool /work/tool2 \
 && echo more >>/srv/second \
 && xattr /work/tool security.capability {CAP_NET_RAW} && rm -r /work/tree && mkdir /work/tree
"""
#: Where fuse-overlayfs 1.10 makes something else of a file with several names, or with setuid, or loses the
#: xattrs of what is in a renamed directory.
LINKED = (
    "work/tool",
    "work/tool2",
    "copy/tool",
    "copy/tool2",
    "got/tool",
    "got/tool2",
    "srv/first",
    "srv/second",
    "srv/sub/a",
)


@pytest.mark.long
def test_an_image_is_the_same_layer_by_layer(make_store: MakeStore, context: Path) -> None:
    if reason := why_not("buildah"):
        pytest.skip(reason)
    (context / "Dockerfile").write_text(DOCKERFILE)
    built: dict[str, dict[str, list[Layer]]] = {}
    for kind in ("layerfs", "fuse-overlayfs", "vfs"):
        store = make_store(kind)
        store.build(context, "first", "--layers", "--target", "first")
        # The second build finds the layers of the first: nothing of them is run again.
        assert store.build(context, "second", "--layers").count("--> Using cache") >= 15
        built[kind] = {name: store.layers(name) for name in ("first", "second")}
        store.buildah("rmi", "-a", "-f")
        store.assert_idle()
    assert len(built["layerfs"]["first"]) == 16
    for name in ("first", "second"):
        assert_same_layers(built["layerfs"][name], built["vfs"][name], "vfs")
        # fuse-overlayfs 1.10 loses setuid and names of hard-linked files, and times of what is renamed
        assert_same_layers(
            built["layerfs"][name], built["fuse-overlayfs"][name], "fuse-overlayfs", but=LINKED, mtimes=False
        )


def test_a_small_image(make_store: MakeStore, context: Path) -> None:
    """The same in short: COPY, RUN and COPY --from, without the cache."""
    if reason := why_not("buildah"):
        pytest.skip(reason)
    (context / "Dockerfile").write_text(SHORT)
    built: dict[str, list[Layer]] = {}
    for kind in ("layerfs", "vfs"):
        store = make_store(kind)
        store.build(context, "made")
        built[kind] = store.layers("made")
        store.buildah("rmi", "-a", "-f")
        store.assert_idle()
    assert {"work/renamed", "work/tool2", "srv/.wh.gone"} <= built["layerfs"][1].keys()
    assert_same_layers(built["layerfs"], built["vfs"], "vfs")
