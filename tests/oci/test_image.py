"""Documents of images, which one of an index is meant, and what images are called."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerfs.errors import ImageError, LayerfsError, UsageError
from layerfs.ids import DiffId
from layerfs.oci.image import (
    CONFIG,
    INDEX,
    LAYERS,
    MANIFEST,
    Descriptor,
    Platform,
    chain_ids,
    parse_config,
    parse_manifest,
)
from layerfs.oci.layout import Layout
from layerfs.oci.platforms import rank, this_machine
from layerfs.oci.references import open_image, split_new_reference, split_reference
from layerfs.oci.strict_json import encode, parse
from tests.oci.images import config_of, entry, make_image, scratch_place, tar_of

REF = "org.opencontainers.image.ref.name"


@pytest.fixture
def place() -> Iterator[Path]:
    with scratch_place("img") as path:
        yield path


# -- documents ----------------------------------------------------------------------------------------


def test_chain_ids() -> None:
    """config.md: ChainID(L0) = DiffID(L0);
    ChainID(L0|...|Ln) = Digest(ChainID(L0|...|Ln-1) + " " + DiffID(Ln))."""
    ids = [DiffId("sha256:" + hashlib.sha256(bytes([n])).hexdigest()) for n in range(3)]
    second = "sha256:" + hashlib.sha256(f"{ids[0]} {ids[1]}".encode()).hexdigest()
    third = "sha256:" + hashlib.sha256(f"{second} {ids[2]}".encode()).hexdigest()
    assert chain_ids(ids) == (ids[0], second, third)
    assert chain_ids([]) == ()


#: The example of image-spec's config.md (v1.0), shortened by nothing that is read here.
SPEC_CONFIG = """{
    "created": "2015-10-31T22:22:56.015925234Z",
    "author": "Alyssa P. Hacker <alyspdev@example.com>",
    "architecture": "amd64",
    "os": "linux",
    "config": {
        "User": "alice",
        "ExposedPorts": {"8080/tcp": {}},
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "FOO=oci_is_a",
                "BAR=well_written_spec"],
        "Entrypoint": ["/bin/my-app-binary"],
        "Cmd": ["--foreground", "--config", "/etc/my-app.d/default.cfg"],
        "Volumes": {"/var/job-result-data": {}, "/var/log/my-app-logs": {}},
        "WorkingDir": "/home/alice",
        "Labels": {"com.example.project.git.url": "https://example.com/project.git"}
    },
    "rootfs": {
        "diff_ids": ["sha256:c6f988f4874bb0add23a778f753c65efe992244e148a1d2ec2a8b664fb66bbd1",
                     "sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef"],
        "type": "layers"
    },
    "history": [
        {"created": "2015-10-31T22:22:54.690851953Z",
         "created_by": "/bin/sh -c #(nop) ADD file:a3bc1e842b69636f9df5256c49c5374fb4eef1e281fe3f282c65fb853ee171c5 in /"},
        {"created": "2015-10-31T22:22:55.613815829Z", "created_by": "/bin/sh -c #(nop) CMD [\\"sh\\"]",
         "empty_layer": true},
        {"created": "2015-10-31T22:22:56.329850019Z", "created_by": "/bin/sh -c apk add curl"}
    ]
}"""  # noqa: E501


def test_the_specifications_config() -> None:
    config = parse_config(SPEC_CONFIG.encode())
    assert config.author == "Alyssa P. Hacker <alyspdev@example.com>"
    assert config.config.entrypoint == ("/bin/my-app-binary",)
    assert config.config.working_dir == "/home/alice"
    assert list(config.config.exposed_ports) == ["8080/tcp"]
    assert [entry.empty_layer for entry in config.history] == [False, True, False]
    assert len(config.rootfs.diff_ids) == 2
    assert config.raw == json.loads(SPEC_CONFIG)
    assert config.data == SPEC_CONFIG.encode()


def test_nulls_are_as_what_is_not_there() -> None:
    """As programs in Go write what is empty."""
    config = parse_config(
        encode(
            {
                "architecture": "amd64",
                "os": "linux",
                "author": None,
                "config": {"Env": None, "Cmd": None, "Labels": None, "Volumes": None, "OnBuild": None},
                "rootfs": {"type": "layers", "diff_ids": None},
                "history": None,
            }
        )
    )
    assert config.config.env == () and config.config.labels == {} and config.history == ()
    assert config.raw["config"]["Env"] is None


def test_media_types_of_layers() -> None:
    """Every type that is read has a name in OCI; those of OCI are their own."""
    for old, new in LAYERS.items():
        assert new.startswith("application/vnd.oci.image.layer.")
        assert LAYERS[new] == new
        assert ("foreign" in old or "nondistributable" in old) == ("nondistributable" in new)
        assert old.rpartition("gzip")[1:2] == new.rpartition("gzip")[1:2]


@pytest.mark.parametrize("media_type", [*LAYERS])
def test_every_type_of_layer_is_taken(media_type: str) -> None:
    layer = {"mediaType": media_type, "digest": "sha256:" + "0" * 64, "size": 1}
    config = {"mediaType": CONFIG, "digest": "sha256:" + "0" * 64, "size": 1}
    manifest = parse_manifest(encode({"schemaVersion": 2, "config": config, "layers": [layer]}))
    assert manifest.layers[0].media_type == media_type


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)


@given(st.dictionaries(st.text(), _VALUES))
def test_json_comes_back_as_it_was(document: dict[str, Any]) -> None:
    assert parse(encode(document), "it", 1 << 20) == document
    assert parse(json.dumps(document).encode(), "it", 1 << 20) == document


# -- platforms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("x86_64", "linux/amd64"),
        ("aarch64", "linux/arm64"),
        ("armv7l", "linux/arm/v7"),
        ("armv6l", "linux/arm/v6"),
        ("i686", "linux/386"),
        ("riscv64", "linux/riscv64"),
        ("ppc64le", "linux/ppc64le"),
        ("s390x", "linux/s390x"),
        ("loongarch64", "linux/loong64"),
    ],
)
def test_names_of_machines(machine: str, expected: str) -> None:
    assert str(this_machine(machine)) == expected


@pytest.mark.parametrize(
    ("machine", "offered", "expected"),
    [
        ("x86_64", ["arm64", "amd64", "386"], "amd64"),
        ("x86_64", ["amd64/v3", "amd64", "amd64/v2"], "amd64"),
        ("x86_64", ["amd64/v3", "amd64/v2"], "amd64/v2"),
        ("x86_64", ["arm64", "386"], None),
        ("aarch64", ["arm/v7", "arm64/v8"], "arm64/v8"),
        ("aarch64", ["arm64/v9", "arm64"], "arm64"),
        ("aarch64", ["arm/v7"], None),
        ("armv7l", ["arm/v5", "arm/v7", "arm/v6", "arm/v8"], "arm/v7"),
        ("armv7l", ["arm/v5", "arm", "arm/v6"], "arm"),
        ("armv6l", ["arm/v7", "arm/v5", "arm/v6"], "arm/v6"),
        ("armv6l", ["arm/v7", "arm/v5"], "arm/v5"),
        ("armv6l", ["arm/v7", "arm"], None),
        ("armv7l", ["arm/nonsense"], "arm/nonsense"),
    ],
)
def test_the_best_of_several(machine: str, offered: list[str], expected: str | None) -> None:
    here = this_machine(machine)
    ranked = []
    for name in offered:
        architecture, _, variant = name.partition("/")
        fit = rank(Platform(architecture, "linux", variant), here)
        assert rank(Platform(architecture, "windows", variant), here) is None
        if fit is not None:
            ranked.append((fit, name))
    assert (min(ranked)[1] if ranked else None) == expected


# -- indexes --------------------------------------------------------------------------------------------


def several(path: Path, *architectures: str, media_type: str = INDEX, told: bool = True) -> dict[str, str]:
    """An image of several platforms under `t`: architecture -> digest of its manifest."""
    layout = Layout.create(str(path))
    digests, entries = {}, []
    for architecture in architectures:
        config = layout.put_json({**config_of([]), "architecture": architecture}, CONFIG)
        manifest = layout.put_json({"schemaVersion": 2, "config": entry(config), "layers": []}, MANIFEST)
        digests[architecture] = str(manifest.digest)
        platform = {"platform": {"os": "linux", "architecture": architecture}} if told else {}
        entries.append(entry(manifest, **platform))
    unknown = {"platform": {"os": "unknown", "architecture": "unknown"}}
    entries.append({"mediaType": MANIFEST, "digest": "sha256:" + "1" * 64, "size": 5, **unknown})
    index = layout.put_json({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}, media_type)
    layout.tag("t", index)
    return digests


HERE = this_machine().architecture
LISTS = [INDEX, "application/vnd.docker.distribution.manifest.list.v2+json"]


@pytest.mark.parametrize("media_type", LISTS)
@pytest.mark.parametrize("told", [True, False], ids=["told", "in the config"])
def test_the_image_for_this_machine(place: Path, media_type: str, told: bool) -> None:
    digests = several(place / "l", "other", HERE, "another", media_type=media_type, told=told)
    image = open_image(f"{place}/l:t")
    assert image.descriptor is not None and image.descriptor.digest == digests[HERE]
    assert image.name == "t"
    other = open_image(f"{place}/l@{digests['other']}")
    assert other.config.architecture == "other"
    assert other.name == ""


def test_no_image_for_this_machine(place: Path) -> None:
    several(place / "l", "other", "another")
    with pytest.raises(ImageError, match="only for linux/another, linux/other, unknown/unknown"):
        open_image(f"{place}/l:t")


def test_an_index_in_an_index(place: Path) -> None:
    digests = several(place / "l", HERE)
    layout = Layout.open(str(place / "l"))
    (inner,) = layout.index().raw["manifests"]
    for _ in range(2):
        stored = layout.put_json({"schemaVersion": 2, "manifests": [inner]}, INDEX)
        inner = entry(stored)
    layout.tag("deep", Descriptor(INDEX, inner["digest"], inner["size"]))
    image = open_image(f"{place}/l:deep")
    assert image.descriptor is not None and image.descriptor.digest == digests[HERE]
    # and by the digest of the index
    image = open_image(f"{place}/l@{inner['digest']}")
    assert image.descriptor is not None and image.descriptor.digest == digests[HERE]


def test_the_one_image_of_another_machine_is_taken(place: Path) -> None:
    make_image(place / "l", architecture="other")
    assert open_image(f"{place}/l:t").config.architecture == "other"


def test_without_a_tag(place: Path) -> None:
    make_image(place / "l", "one")
    assert open_image(f"{place}/l").name == "one"
    make_image(place / "l", "two", author="two")
    with pytest.raises(ImageError, match="there is one, two"):
        open_image(f"{place}/l")
    make_image(place / "l", "latest", author="three")
    assert open_image(f"{place}/l").config.author == "three"


# -- references -------------------------------------------------------------------------------------------


def test_what_is_a_path_and_what_a_tag(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for name in ("l", "l:x", "with:many:colons", "rep"):
        make_image(place / name, "t")
    for reference, expected in {
        "l:t": ("l", "t"),
        "l": ("l", None),
        "./l:t": ("./l", "t"),
        "l:x": ("l:x", None),
        "l:x:t": ("l:x", "t"),
        "l:y:t": ("l", "y:t"),
        "with:many:colons:t": ("with:many:colons", "t"),
        "rep:docker.io/library/x:1": ("rep", "docker.io/library/x:1"),
        f"{place}/l:t": (f"{place}/l", "t"),
        "l@sha256:" + "0" * 64: ("l", "sha256:" + "0" * 64),
        "l:t@sha256:" + "0" * 64: ("l:t", "sha256:" + "0" * 64),
    }.items():
        assert split_reference(reference) == expected
    for reference in ("", ":", ":t", "none", "none:t", "\0", "l\0:t"):
        with pytest.raises(LayerfsError) as refused:
            split_reference(reference)
        assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(UsageError):
        split_reference("l:")


def test_where_a_new_image_goes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    make_image(place / "l:x", "t")
    for reference, expected in {
        "new:t": ("new", "t"),
        "new": ("new", "latest"),
        "l:x": ("l:x", "latest"),
        "l:x:t": ("l:x", "t"),
        "a:b/new": ("a:b/new", "latest"),
        "/a:b/new:t": ("/a:b/new", "t"),
    }.items():
        assert split_new_reference(reference) == expected
    for reference in (":t", "new:", "l@sha256:" + "0" * 64, ""):
        with pytest.raises(UsageError):
            split_new_reference(reference)


def test_what_is_not_there(place: Path) -> None:
    os.mkfifo(place / "fifo")
    (place / "file").write_text("x")
    for reference in (f"{place}", f"{place}/fifo", f"{place}/file", f"{place}/none:t", f"{place}/file:t"):
        with pytest.raises(ImageError) as refused:
            open_image(reference)
        assert len(str(refused.value).splitlines()) == 1


def test_two_layers_that_are_the_same(place: Path) -> None:
    layer = tar_of({"a": b"a"})
    make_image(place / "l", layers=[layer, layer])
    first, second = open_image(f"{place}/l:t").layers
    assert first.diff_id == second.diff_id == first.chain_id != second.chain_id
    with first.open() as one, second.open() as two:
        assert one.source.read(100) == two.source.read(100) == layer[:100]
        one.verify()
        two.verify()
