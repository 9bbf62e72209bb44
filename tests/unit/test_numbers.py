"""Inode numbers: layer and real number go in and come out, nothing meets, and what does not fit is still the
same every time.
"""

from __future__ import annotations

from hypothesis import assume, example, given
from hypothesis import strategies as st

from layerfs.ids import Ino, LayerNumber, RealIno
from layerfs.inodes import numbers

layers = st.integers(0, (1 << 14) - 1).map(LayerNumber)
reals = st.integers(2, (1 << 48) - 1).map(RealIno)
any_layer = st.integers(0, 1 << 20).map(LayerNumber)
any_real = st.integers(0, (1 << 64) - 1).map(RealIno)
regions = st.binary(max_size=12)


@given(layers, reals)
@example(LayerNumber(0), RealIno(2))
@example(LayerNumber((1 << 14) - 1), RealIno((1 << 48) - 1))
def test_inverse(layer: LayerNumber, real: RealIno) -> None:
    ino = numbers.compose(layer, real)
    assert numbers.split(ino) == (layer, real)
    assert not ino & (numbers.HASHED | numbers.TEMPORARY)


@given(layers, reals, layers, reals)
def test_no_two_meet(one: LayerNumber, a: RealIno, two: LayerNumber, b: RealIno) -> None:
    assert (numbers.compose(one, a) == numbers.compose(two, b)) == ((one, a) == (two, b))


@given(any_layer, any_real, regions)
@example(LayerNumber(0), RealIno(0), b"")
@example(LayerNumber(0), RealIno(1), b"")
@example(LayerNumber(1 << 14), RealIno(2), b"")
@example(LayerNumber(0), RealIno(1 << 48), b"")
def test_every_number_is_fit_for_ino_t(layer: LayerNumber, real: RealIno, region: bytes) -> None:
    ino = numbers.compose(layer, real, region)
    assert 1 < ino < 1 << 63
    assert numbers.storable(ino)
    assert ino == numbers.compose(layer, real, region)
    plain = layer < 1 << 14 and 1 < real < 1 << 48 and not region
    assert numbers.split(ino) == ((layer, real) if plain else None)


@given(any_layer, any_real, regions, regions)
def test_regions_are_apart(layer: LayerNumber, real: RealIno, one: bytes, two: bytes) -> None:
    assume(one != two)
    assert numbers.compose(layer, real, one) != numbers.compose(layer, real, two)


@given(st.integers(1, 1 << 40))
def test_temporary_ones_are_nobodys(number: int) -> None:
    assert numbers.split(Ino(numbers.TEMPORARY | number)) is None
    assert not numbers.storable(numbers.TEMPORARY | number)


def test_the_root_is_nobodys() -> None:
    assert numbers.split(Ino(1)) is None
    assert not numbers.storable(1)
