import json

import numpy as np
import pytest
from ase import Atoms
from hypothesis import given
from hypothesis import strategies as st

from pathtune.errors import PathtuneError
from pathtune.properties import Structure
from pathtune.structures import (
    average,
    estimate,
    foundation,
    from_file,
    isolated,
)
from tests.reference.reference_energies import least_squares


def frame(formula, energy=None, config_type="default", pbc=False):
    labels = {} if energy is None else {"energy": np.array(float(energy))}
    return Structure(Atoms(formula, pbc=pbc), labels, 1.0, {}, config_type, formula)


SHIFTS = {"H": -13.5, "C": 2.25, "O": -2035.5}
FORMULAE = ["H2O", "CO2", "CH4", "H2", "C2H6O"]


def test_estimate_recovers_the_shifts_exactly():
    base = [1.0, -2.0, 3.0, 0.5, 7.0]
    offsets = [sum(SHIFTS[e] for e in frame(f).atoms.symbols) for f in FORMULAE]
    data = [frame(f, b + o) for f, b, o in zip(FORMULAE, base, offsets, strict=True)]
    fit = estimate(data, base)
    assert list(fit.shifts) == ["H", "C", "O"]
    assert fit.shifts == pytest.approx(SHIFTS, abs=1e-9)
    assert (fit.rank, fit.n_elements, fit.warning) == (3, 3, None)


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(1, 4)),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 2**32 - 1),
)
def test_estimate_equals_its_twin(compositions, seed):
    targets = np.random.default_rng(seed).normal(size=len(compositions))
    data = [
        frame(f"H{h}C{c}O{o}".replace("H0", "").replace("C0", ""), t)
        for (h, c, o), t in zip(compositions, targets, strict=True)
    ]
    present = [
        i for i in range(3) if any(composition[i] for composition in compositions)
    ]
    expected = least_squares([[c[i] for i in present] for c in compositions], targets)
    fit = estimate(data, np.zeros(len(data)))
    np.testing.assert_allclose(list(fit.shifts.values()), expected, atol=1e-10)
    assert (fit.warning is None) == (fit.rank == len(present))


def test_one_composition_warns_and_takes_the_smallest_shifts():
    fit = estimate([frame("H2O", 10.0), frame("H2O", 10.0)], [0.0, 0.0])
    assert fit.shifts == pytest.approx({"H": 4.0, "O": 2.0})
    assert fit.rank == 1
    assert "determine only 1 of 2" in fit.warning


def test_structures_without_energy_do_not_enter_the_fit():
    fit = estimate([frame("H2", 4.0), frame("H2")], [0.0, np.nan])
    assert fit.shifts == pytest.approx({"H": 2.0})


def test_estimate_refuses_what_it_cannot_fit():
    with pytest.raises(PathtuneError, match="no structure has an energy"):
        estimate([frame("H2")], [0.0])
    with pytest.raises(PathtuneError, match="O occurs only in structures without"):
        estimate([frame("H2", 1.0), frame("H2O")], [0.0, 0.0])
    with pytest.raises(PathtuneError, match=r"H2: the base model's .* not finite"):
        estimate([frame("H2", 1.0)], [np.nan])
    with pytest.raises(ValueError, match="0 energies for 1 structures"):
        estimate([frame("H2", 1.0)], [])


def test_average_shifts_the_base_models_reference_energies():
    data = [frame("H2", -2.0), frame("H2O", -5.0)]
    fit = average(data, {"H": 1.0, "O": 1.0, "N": 9.0})
    assert fit.shifts == pytest.approx({"H": -2.0, "O": -4.0})
    with pytest.raises(PathtuneError, match="lone O atom"):
        average(data, {"H": 1.0})


def test_isolated_atoms_give_the_shifts():
    data = [
        frame("H", -13.0),
        frame("O", -430.0, "IsolatedAtom", pbc=True),
        frame("O", 99.0, pbc=True),  # a crystal of one atom per cell is no lone atom
        frame("H2O", 1.0),
    ]
    fit = isolated(data, {"H": -3.0, "O": -30.0})
    assert fit.shifts == {"H": -10.0, "O": -400.0}
    assert foundation(data).shifts == {"H": 0.0, "O": 0.0}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([frame("H", 1.0), frame("O2", 1.0)], "no isolated atom with an energy for O"),
        ([frame("H", 1.0), frame("H", 2.0)], "second isolated H"),
        ([frame("H2", 1.0, "IsolatedAtom")], "has 2 atoms"),
        ([frame("O", 1.0)], "lone O atom"),
    ],
)
def test_isolated_atoms_refuses(data, message):
    with pytest.raises(PathtuneError, match=message):
        isolated(data, {"H": 0.0})


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_reference_energies_from_a_file(tmp_path, suffix):
    path = tmp_path / f"e0.{suffix}"
    path.write_text(json.dumps({"O": -430.0, "H": -13, "He": -70.0}))
    fit = from_file(path, {"H": -3.0, "O": -30.0})
    assert fit.shifts == {"H": -10.0, "O": -400.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{H: -13}", "no energy for O"),
        ("{H: -13, O: -430, Feo: 1}", "unknown element 'Feo'.*Did you mean 'Fe'"),
        ("{H: -13, O: abc}", "the energy of O is 'abc', expected a number"),
        ("{H: -13, O: true}", "the energy of O is True"),
        ("{H: -13, O: .nan}", "the energy of O is nan"),
        ("[1, 2]", "expected a mapping"),
        ("{H: ", "cannot read the reference energies"),
    ],
)
def test_a_wrong_file_of_reference_energies(tmp_path, text, message):
    path = tmp_path / "e0.yaml"
    path.write_text(text)
    with pytest.raises(PathtuneError, match=rf"e0\.yaml: {message}"):
        from_file(path, {"H": 0.0, "O": 0.0})
    with pytest.raises(PathtuneError, match=r"missing\.yaml: cannot read"):
        from_file(tmp_path / "missing.yaml", {})
