"""What is fuzzed: functions that take any bytes and return, or raise whatever is wrong with layerfs. Knows no
fuzzer.

A new target is a function, some seeds, and a line in TARGETS."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import zstandard

from layerfs.errors import ImageError, LayerError, TarError
from layerfs.oci.docker_archive import DockerArchive
from layerfs.oci.image import CONFIG, MANIFEST, digest_of, parse_config, parse_index, parse_manifest
from layerfs.oci.member import Kind, Member, plain_path
from layerfs.oci.streams import MEDIA_TYPES, LayerSource
from layerfs.oci.strict_json import encode
from layerfs.oci.tarreader import TarReader
from tests.oci import members as m
from tests.oci.test_flatten import flat


@dataclass(frozen=True)
class Target:
    """`read` must return for any bytes; `seeds` are small inputs that it likes."""

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


def _layers() -> list[bytes]:
    """Plain tars with everything that a layer can hold."""
    xattrs = {"user.k": b"v", "security.capability": b"\1\0\0\2" + bytes(16)}
    return [
        m.tar_bytes([]),
        m.tar_bytes([m.file(b"a", b"x" * 600)]),
        m.tar_bytes(
            [
                m.directory(b""),
                m.directory(b"d", mode=0o1777, mtime_ns=1_600_000_000_123_456_789),
                m.file(b"d/.wh.gone"),
                m.file(b"d/.wh..wh..opq"),
                m.file(b"d/" + b"n" * 120, b"1", uid=3_000_000, xattrs=xattrs),
                m.hardlink(b"d/h", b"d/" + b"n" * 120),
                m.link(b"l", b"../" * 50),
            ]
        ),
        m.tar_bytes(
            [
                (Member(b"null", Kind.CHAR, 0o666, rdev=(1, 3)), b""),
                (Member(b"pipe", Kind.FIFO, mtime_ns=-1), b""),
                m.file(b"\xff\xfe", b"", mtime_ns=-(10**18)),
            ]
        ),
    ]


def _compressed() -> list[bytes]:
    plain = _layers()
    zstd = zstandard.ZstdCompressor(write_checksum=True)
    skippable = b"\x5f\x2a\x4d\x18\5\0\0\0hello"
    return [
        *plain,
        *(gzip.compress(raw, mtime=0) for raw in plain),
        *(zstd.compress(raw) for raw in plain),
        gzip.compress(plain[1][:700]) + gzip.compress(plain[1][700:]) + bytes(20),
        skippable + zstd.compress(plain[1][:700]) + skippable + zstd.compress(plain[1][700:]),
    ]


def _read(raw: bytes, *, digests: bool) -> tuple[list[tuple[Member, bytes]], str]:
    """All members, and what was said at the end."""
    found: list[tuple[Member, bytes]] = []
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, raw)
        os.lseek(fd, 0, os.SEEK_SET)
        with LayerSource(fd, digests=digests) as source:
            reader = TarReader(source)
            for member in reader:
                found.append((member, b"".join(iter(lambda: reader.read(70_000), b""))))
            if digests:
                source.drain()
                assert source.raw_size == len(raw)
    except TarError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        return found, str(error)
    finally:
        os.close(fd)
    return found, ""


def read_layer(raw: bytes) -> None:
    """Any bytes are members or a TarError, the same ones however they are read; members are what the writer
    could have written."""
    found, said = _read(raw, digests=False)
    assert (found, said) == _read(raw, digests=True)
    for member, data in found:
        assert len(data) == member.size
        assert not member.name or plain_path(member.name) == member.name
        assert 0 <= member.mode <= 0o7777
    if sum(len(data) for _, data in found) < 1 << 20:
        assert _read(m.tar_bytes(found), digests=False) == (found, "")


def read_tar(raw: bytes) -> None:
    """As `read_layer`, with checksums put right first: else few of a fuzzer's headers are ever looked at."""
    read_layer(_with_checksums(raw))


def join_layers(raw: bytes) -> None:
    """The members of a tar, taken for two layers: refused, or one layer that no name is twice in and that
    stays the same when it is joined again."""
    members, _ = _read(_with_checksums(raw), digests=False)
    layers = members[: len(members) // 2], members[len(members) // 2 :]
    for whole in (True, False):
        try:
            one = flat(layers, whole=whole)
        except LayerError as error:
            assert "\n" not in str(error) and str(error).isprintable()
            continue
        assert len({member.name for member, _ in one}) == len(one)
        assert not whole or not [member for member, _ in one if b"/.wh." in b"/" + member.name]
        assert flat([one], whole=whole) == one


def _with_checksums(raw: bytes) -> bytes:
    blocks = [raw[at : at + 512] for at in range(0, len(raw), 512)]
    return b"".join(_with_checksum(block) if block[257:262] == b"ustar" else block for block in blocks)


def _with_checksum(block: bytes) -> bytes:
    total = sum(block[:148]) + 8 * 0x20 + sum(block[156:])
    return block[:148] + b"%06o\0 " % total + block[156:]


def _documents() -> list[bytes]:
    """An index, a manifest and a config, as layerfs writes them and as strangers do."""
    digest = f"sha256:{'0' * 64}"
    blob = {"mediaType": MEDIA_TYPES["gzip"], "digest": digest, "size": 5, "urls": [], "annotations": None}
    config = {**blob, "mediaType": CONFIG}
    platform = {"os": "linux", "architecture": "arm", "variant": "v7"}
    execution: dict[str, object] = {
        "Env": ["A=b"],
        "Cmd": None,
        "Entrypoint": [],
        "Volumes": {"/v": {}},
        "Labels": {"l": "\u00e9"},
    }
    return [
        encode({"schemaVersion": 2, "manifests": [{**blob, "mediaType": MANIFEST, "platform": platform}]}),
        encode({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [blob]}),
        json.dumps(  # with escapes
            {
                "architecture": "arm",
                "os": "linux",
                "config": execution,
                "rootfs": {"type": "layers", "diff_ids": [digest]},
                "history": [{"created_by": "x", "comment": "\U0001f600", "empty_layer": True}, {}],
                "unknown": [1.5e300, -7, {"deep": [[[]]]}],
            }
        ).encode(),
    ]


def read_documents(raw: bytes) -> None:
    """Any bytes are a document or an ImageError of one line; what was a document can be written and is the
    same again."""
    for parse in (parse_index, parse_manifest, parse_config):
        try:
            document = parse(raw)
        except ImageError as error:
            assert "\n" not in str(error) and str(error).isprintable()
            continue
        again = parse(encode(document.raw))
        assert again == document
        assert again.raw == document.raw


def _archives() -> list[bytes]:
    """Images in tars: docker's form, with a link, and an OCI layout."""
    layer = m.tar_bytes([m.file(b"a")])
    config = {
        "architecture": "a",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [digest_of(layer)]},
    }
    entry = {"Config": "c.json", "RepoTags": ["x:t"], "Layers": ["l/layer.tar"]}
    index = {"schemaVersion": 2, "manifests": []}
    return [
        m.tar_bytes(
            [
                m.file(b"manifest.json", encode([entry])),
                m.file(b"c.json", encode(config)),
                m.link(b"l/layer.tar", b"../m.tar"),
                m.file(b"m.tar", layer),
            ]
        ),
        m.tar_bytes([m.file(b"oci-layout", b"{}"), m.file(b"index.json", encode(index))]),
    ]


def read_archive(raw: bytes) -> None:
    """Any bytes are an archive or a LayerError of one line; what its layers are is verified."""
    fd = os.memfd_create("fuzz")
    try:
        os.write(fd, _with_checksums(raw))
        image = DockerArchive(f"/proc/self/fd/{fd}").image(None, "it")
        for layer in image.layers:
            with layer.open() as opened:
                opened.verify()
    except LayerError as error:
        assert "\n" not in str(error) and str(error).isprintable()
    finally:
        os.close(fd)


TARGETS = {
    "layer": Target(read_layer, _compressed),
    "tar": Target(read_tar, _layers),
    "join": Target(join_layers, _layers),
    "image": Target(read_documents, _documents),
    "archive": Target(read_archive, _archives),
}
