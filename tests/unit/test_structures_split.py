import pytest
from ase import Atoms
from hypothesis import given
from hypothesis import strategies as st

from pathtune.errors import PathtuneError, UsageError
from pathtune.properties import Structure
from pathtune.structures import split_validation


def frames(n):
    return [Structure(Atoms("H"), source=str(i)) for i in range(n)]


@given(st.integers(2, 60), st.floats(0.001, 0.999), st.integers(0, 2**32 - 1))
def test_the_parts_are_disjoint_complete_and_in_order(n, fraction, seed):
    data = frames(n)
    train, valid = split_validation(data, fraction, seed=seed)
    place = {id(s): i for i, s in enumerate(data)}
    first, second = ([place[id(s)] for s in part] for part in (train, valid))
    assert first and second
    assert first == sorted(first) and second == sorted(second)
    assert sorted(first + second) == list(range(n))
    assert len(valid) == min(max(1, round(fraction * n)), n - 1)


def test_the_seed_decides():
    def chosen(seed):
        return [s.source for s in split_validation(frames(40), 0.25, seed=seed)[1]]

    assert chosen(0) == chosen(0)
    assert len({tuple(chosen(seed)) for seed in range(5)}) == 5


def test_refuses_what_it_cannot_split():
    with pytest.raises(PathtuneError, match="cannot split 1 structure"):
        split_validation(frames(1), seed=0)
    for fraction in (0.0, 1.0, -0.5, float("nan")):
        with pytest.raises(UsageError, match="between 0 and 1"):
            split_validation(frames(4), fraction, seed=0)
