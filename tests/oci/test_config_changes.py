"""`--change`: the same config comes out as where buildah runs the same instructions in a Dockerfile, and as
where podman commit takes them."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerfs.errors import UsageError
from layerfs.oci.config_changes import apply_changes
from layerfs.oci.shell_words import expand, split
from tests.oci.images import Tools, make_image, scratch_place

BASE: dict[str, Any] = {
    "Env": ["PATH=/bin", "A=one", "SP=80 443", "E="],
    "Cmd": ["base", "cmd"],
    "Entrypoint": ["base"],
    "WorkingDir": "/srv",
    "Labels": {"l": "base", "k": "kept"},
    "ExposedPorts": {"22/tcp": {}},
    "Volumes": {"/v": {}},
    "User": "u",
    "StopSignal": "SIGTERM",
}

#: Each a list of instructions that docker's own grammar takes.
TABLE = [
    ['CMD ["a", "b c"]'],
    ["CMD a  b 'c'"],
    ["CMD $A"],
    ["CMD ['a']"],
    ['cmd ["\\u00e9\\n"]'],
    ["CMD []"],
    ['ENTRYPOINT ["e"]'],
    ["ENTRYPOINT e f"],
    ["ENTRYPOINT []"],
    ['CMD ["c"]', 'ENTRYPOINT ["e"]'],
    ['ENTRYPOINT ["e"]', 'CMD ["c"]'],
    ["ENV B=x"],
    ["ENV A=x"],
    ["ENV a=b c=\"d e\" f='g h' i=j\\ k"],
    ["ENV a b"],
    ["ENV a b c=d"],
    ['ENV a "b  c"'],
    ["ENV B=$A C=${A} D=${A}x D2=$Ax"],
    ["ENV B=${N:-word} C=${N:+word} D=${A:-w} F=${A:+w} G=${E:-w}"],
    ["ENV B=${N:-$A}"],
    ['ENV B=\'$A\' C=\\$A D="\\$A" F="$A"'],
    ["ENV A=two B=$A", "ENV C=$A"],
    ['ENV B=a\\\\b C="a\\b" D="a\\\\b" F=\'a\\b\''],
    ['ENV B= C="" D=x'],
    ["ENV B=a=b=c"],
    ["ENV B=a$"],
    ["ENV B=it\\'s"],
    ["ENV B=\"x\"'y'z"],
    ["LABEL a=b"],
    ["LABEL l=new 'a b'=\"c d\""],
    ['LABEL com.example.vendor="ACME Incorporated" x=${A}'],
    ["LABEL old style label"],
    ["EXPOSE 80"],
    ["EXPOSE 80/tcp 53/udp 22"],
    ["EXPOSE $N 81"],
    ["USER bob"],
    ["USER $A:10"],
    ["USER 0"],
    ["VOLUME /a /b"],
    ['VOLUME ["/a", "/b c"]'],
    ["VOLUME /$A"],
    ["WORKDIR /abs"],
    ["WORKDIR rel"],
    ["WORKDIR rel/../up", "WORKDIR more"],
    ["WORKDIR ${A}"],
    ["STOPSIGNAL SIGKILL"],
    ["STOPSIGNAL 9"],
    ["  USER   x  "],
    ["USER\tx"],
]
#: Where buildah 1.28 keeps what docker turns into what an OCI config may hold (config.md: a port is
#: `port/tcp`, `port/udp` or `port`), and layerfs does as docker.
PORTS = {
    "EXPOSE 1000-1002/udp": ({"1000-1002/udp"}, {"1000/udp", "1001/udp", "1002/udp"}),
    "EXPOSE 80/TCP": ({"80/TCP"}, {"80/tcp"}),
    "EXPOSE $SP": ({"80/tcp", "443/tcp"}, {"80/tcp", "443/tcp"}),
}
#: What podman commit, which knows neither quotes nor variables and writes signals as numbers, understands as
#: docker does.
SIMPLE = [
    'CMD ["a","b"]',
    "CMD a b",
    'ENTRYPOINT ["e"]',
    "ENV A=x",
    "ENV N=y",
    "EXPOSE 80/udp",
    "LABEL l=x",
    "USER bob",
    "VOLUME /a",
    "WORKDIR /abs",
]
REFUSED = [
    "",
    "   ",
    "CMD",
    "FROM x",
    "RUN x",
    "ONBUILD RUN x",
    "HEALTHCHECK NONE",
    'SHELL ["/bin/bash"]',
    "CMD [1]",
    'CMD ["a", ["b"]]',
    'CMD ["a"] b',
    "CMD a\nUSER b",
    "ENV A",
    "ENV A=b C",
    "ENV =b",
    'ENV A="b',
    "ENV A='b",
    "ENV A=${",
    "ENV A=${}",
    "ENV A=${A",
    "ENV A=${A!x}",
    "ENV A=${N:?}",
    "LABEL ''=x",
    "LABEL a",
    "EXPOSE x",
    "EXPOSE 65536",
    "EXPOSE 80-79",
    "EXPOSE 80/icmp",
    "EXPOSE -1",
    "EXPOSE 99999999999999999999",
    'VOLUME [""]',
    "VOLUME $N",
    "WORKDIR $N",
    "STOPSIGNAL SIGNONE",
    "STOPSIGNAL 0",
    "STOPSIGNAL 65",
    "STOPSIGNAL RTMIN+16",
    "USER \udcff",
    'CMD ["\\ud800"]',
]

needs_buildah = pytest.mark.skipif(
    not shutil.which("buildah") or os.geteuid() != 0, reason="needs buildah, and root for its storage"
)


def plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Without empty fields, which mean nothing, the order of Env, and what buildah adds."""
    labels = {key: value for key, value in fields.get("Labels", {}).items() if key != "io.buildah.version"}
    found = {**fields, "Labels": labels, "Env": sorted(fields["Env"])}
    return {key: value for key, value in found.items() if value}


@pytest.fixture(scope="module")
def tools() -> Iterator[Tools]:
    with scratch_place("ch") as place:
        make_image(place / "layout", config=BASE)
        yield Tools(place)


def built(tools: Tools, changes: list[str]) -> dict[str, Any]:
    """The config that buildah makes of the instructions."""
    file = tools.place / "Dockerfile"
    file.write_text("\n".join([f"FROM oci:{tools.place}/layout:t", *changes]))
    tools.buildah("bud", "--isolation", "chroot", "-q", "-t", "localhost/built", "-f", file, tools.place)
    said = json.loads(tools.buildah("inspect", "--type", "image", "localhost/built"))
    return plain(said["OCIv1"]["config"])


@needs_buildah
@pytest.mark.root
@pytest.mark.parametrize("changes", TABLE, ids="; ".join)
def test_as_buildah_builds_a_dockerfile(tools: Tools, changes: list[str]) -> None:
    assert plain(apply_changes(BASE, changes)) == built(tools, changes)


@needs_buildah
@pytest.mark.root
@pytest.mark.parametrize("change", PORTS)
def test_ports_that_buildah_leaves_as_they_are(tools: Tools, change: str) -> None:
    theirs, ours = PORTS[change]
    assert built(tools, [change])["ExposedPorts"].keys() == theirs | {"22/tcp"}
    assert apply_changes(BASE, [change])["ExposedPorts"].keys() == ours | {"22/tcp"}


@pytest.mark.skipif(
    not shutil.which("podman") or os.geteuid() != 0, reason="needs podman, and root for its storage"
)
@pytest.mark.root
def test_as_podman_commits(tools: Tools) -> None:
    tools.podman("create", "--name", "changed", f"oci:{tools.place}/layout:t")
    try:
        for change in SIMPLE:
            tools.podman("commit", "-q", "--change", change, "changed", "localhost/committed")
            said = json.loads(tools.buildah("inspect", "--type", "image", "localhost/committed"))
            found = plain(said["OCIv1"]["config"])
            # podman also keeps the container's own environment, and a CMD beside a new ENTRYPOINT
            ours = plain(apply_changes(BASE, [change]))
            if change.startswith("ENTRYPOINT"):
                assert found.pop("Cmd") == BASE["Cmd"]
                assert "Cmd" not in ours
            found["Env"] = [each for each in found["Env"] if each not in ("container=podman", "TERM=xterm")]
            assert found == ours, change
    finally:
        tools.podman("rm", "-f", "changed")


@pytest.mark.parametrize("change", REFUSED)
def test_refused_in_one_line(change: str) -> None:
    before = copy.deepcopy(BASE)
    with pytest.raises(UsageError) as refused:
        apply_changes(BASE, ["USER x", change])
    assert len(str(refused.value).splitlines()) == 1
    assert before == BASE


def test_what_is_not_known_stays() -> None:
    base = {"Healthcheck": {"Test": ["NONE"]}, "Shell": ["/bin/bash", "-ec"], "Cmd": None}
    changed = apply_changes(base, ["CMD a b"])
    assert changed == {**base, "Cmd": ["/bin/bash", "-ec", "a b"]}
    assert base["Cmd"] is None


_TEXT = st.text().filter(lambda text: not set(text) & set("\0\n\r"))


@given(_TEXT)
def test_a_quoted_value_is_itself(value: str) -> None:
    quoted = '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$") + '"'
    assert split(f"x={quoted} y=z") == [f"x={quoted}", "y=z"]
    assert expand(quoted, {}) == value
    assert apply_changes({}, [f"ENV x={quoted} y=z"])["Env"] == [f"x={value}", "y=z"]


@given(st.text("ab$\\{}'\":-+? =A"))
def test_any_text_is_taken_or_refused(text: str) -> None:
    for instruction in ("ENV", "LABEL", "EXPOSE", "USER", "VOLUME", "WORKDIR", "CMD"):
        try:
            apply_changes(BASE, [f"{instruction} {text}"])
        except UsageError as refused:
            assert len(str(refused).splitlines()) == 1
