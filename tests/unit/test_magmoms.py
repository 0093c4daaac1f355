"""Magnetic moments in loss, errors and selection: without a backend."""

from __future__ import annotations

import ase
import ase.io
import numpy as np
import pytest
import torch

from pathtune import metrics, structures
from pathtune.errors import PathtuneError
from pathtune.paths import Path, PathWeight, alive_entries
from pathtune.properties import Structure, moment_vectors, moments_as_predicted
from pathtune.training.loss import collate, labels_of, loss_terms
from tests.reference import magmoms as twin

NAN = float("nan")
SIGNED = Structure(ase.Atoms("NiO2"), {"magmoms": np.array([-1.7, 0.1, 0.2])})
VECTORS = Structure(
    ase.Atoms("NiO"),
    {"magmoms": np.array([[0.6, 0.0, -0.8], [0.0, 0.3, 0.4]])},
    weight=2.0,
    property_weights={"magmoms": 1.5},
)
PARTIAL = Structure(ase.Atoms("NiO"), {"magmoms": np.array([1.5, NAN])})
MISSING = Structure(ase.Atoms("H2"))
FRAMES = [SIGNED, VECTORS, PARTIAL, MISSING]
PREDICTED = np.array([1.5, 0.0, 0.25, 1.2, 0.4, 1.0, 9.0, 7.0, 7.0])


def term(frames, predicted, delta=0.3):
    labels = collate([labels_of(s, {}) for s in frames])
    predicted = torch.as_tensor(predicted).requires_grad_()
    loss = loss_terms({"magmoms": predicted}, labels, delta)["magmoms"]
    (gradient,) = torch.autograd.grad(loss, predicted)
    return loss.item(), gradient


def test_loss_is_the_twins_with_signs_vectors_masks_and_weights():
    loss, gradient = term(FRAMES, PREDICTED)
    expected = twin.loss(
        [
            (SIGNED.labels["magmoms"].tolist(), 1.0),
            (VECTORS.labels["magmoms"].tolist(), 3.0),
            (PARTIAL.labels["magmoms"].tolist(), 1.0),
            ([NAN, NAN], 0.0),
        ],
        PREDICTED.tolist(),
        0.3,
    )
    assert loss == pytest.approx(expected, abs=1e-12)
    assert gradient[:6].count_nonzero() == 6
    assert gradient[6:].count_nonzero() == 0, "an atom or frame without label"


def test_no_label_at_all_gives_zero_even_where_the_prediction_is_nan():
    loss, gradient = term([MISSING], [0.1, 0.2])
    assert (loss, gradient.count_nonzero()) == (0, 0)


def test_vectors_are_compared_as_vectors_where_a_model_predicts_them():
    predicted = VECTORS.labels["magmoms"] + [[0.1, 0, 0], [0, 0, 0]]
    loss, gradient = term([VECTORS], predicted)
    assert loss == pytest.approx(3 * 0.5 * 0.1**2 / 6)
    assert gradient.count_nonzero() == 1


def test_form_of_a_moment():
    vectors = moment_vectors(np.array([-2.0, 1.0]))
    assert vectors.tolist() == [[0, 0, -2], [0, 0, 1]]
    assert moment_vectors(vectors) is vectors
    assert moments_as_predicted(vectors, np.zeros(2)).tolist() == [2, 1]
    assert moments_as_predicted(vectors, vectors) is vectors


def test_errors_by_magnitude_leave_out_atoms_without_label():
    predictions = [
        {"magmoms": values} for values in np.split(PREDICTED, np.cumsum([3, 2, 2]))
    ]
    result = metrics.errors(FRAMES, predictions)
    expected = [0.2, 0.1, 0.05, 0.2, 0.1, 0.5]
    assert result["magmom_mae_mu_b"] == pytest.approx(np.mean(expected))
    assert result["magmom_rmse_mu_b"] == pytest.approx(
        np.sqrt(np.mean(np.square(expected)))
    )
    assert metrics.summary(result) == [f"M {np.mean(expected):.3f} μ_B"]
    assert "by_element" not in result
    unlabelled = Structure(ase.Atoms("Ni"), {"magmoms": np.array([NAN])})
    assert metrics.errors([unlabelled], [{"magmoms": np.ones(1)}]) == {
        "n_structures": 1
    }


def test_errors_of_vectors_by_length_magnitude_angle_and_element():
    angle = np.radians(0.02)  # arccos of their product alone would be off by percents
    label = np.array([[0, 0, 2], [0, 0, 0.1], [NAN, NAN, NAN], [1, 0, 0]])
    predicted = [
        [2 * np.sin(angle), 0, 2 * np.cos(angle)],
        [0.3, 0, 0.4],  # the angle of a small moment does not count
        [5, 5, 5],
        [0, 3, 0],
    ]
    structure = Structure(
        ase.Atoms("NiO2Ni"),
        {"magmoms": label, "magforces": np.array([[NAN] * 3, *np.zeros((3, 3))])},
    )
    found = {"magmoms": np.array(predicted), "magforces": np.full((4, 3), 1e-3)}
    result = metrics.errors([structure], [found])
    by_hand = np.sqrt(0.3**2 + 0.3**2)
    lengths = [4 * np.sin(angle / 2), by_hand, 10**0.5]
    assert result["magmom_vector_mae_mu_b"] == pytest.approx(np.mean(lengths))
    assert result["magmom_magnitude_mae_mu_b"] == pytest.approx((0.4 + 2) / 3)
    assert result["magmom_angle_mae_degrees"] == pytest.approx((0.02 + 90) / 2)
    assert result["magforces_mae_mev_per_mu_b"] == pytest.approx(1)
    nickel, oxygen = (result["by_element"][e] for e in ("Ni", "O"))
    assert nickel["magmom_angle_mae_degrees"] == pytest.approx(45.01)
    assert oxygen["magmom_vector_mae_mu_b"] == pytest.approx(by_hand)
    assert "magmom_angle_mae_degrees" not in oxygen
    assert metrics.summary(result)[-1] == "H 1.00 meV/μ_B"


def test_loss_of_magnetic_forces_leaves_out_atoms_without_label():
    label = np.array([[0.1, 0, 0], [NAN, NAN, NAN]])
    labelled = Structure(ase.Atoms("NiO"), {"magforces": label})
    labels = collate([labels_of(s, {}) for s in (labelled, MISSING)])
    predicted = torch.full((4, 3), 0.3, dtype=torch.float64, requires_grad=True)
    loss = loss_terms({"magforces": predicted}, labels, 10.0)["magforces"]
    assert loss.item() == pytest.approx((0.2**2 + 2 * 0.3**2) / 2 / 3)
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert gradient[0].count_nonzero() == 3
    assert gradient[1:].count_nonzero() == 0
    rows = structures.survey([labelled, MISSING]).rows("magforces")
    assert rows.tolist() == [1, 0]


def test_atoms_without_a_moment_are_nan_in_a_file(tmp_path):
    frames = [ase.Atoms("NiO", [[0, 0, 0], [0, 0, 2]]) for _ in range(3)]
    for atoms, moments in zip(frames, ([1.5, NAN], [NAN, NAN], [20, 0]), strict=True):
        atoms.info["REF_energy"] = -1.0
        atoms.arrays["REF_magforces"] = np.array([[NAN] * 3, [0.1, 0.2, 0.3]])
        atoms.arrays["REF_magmoms"] = np.array(moments)
    ase.io.write(tmp_path / "data.xyz", frames)
    read = structures.read(tmp_path / "data.xyz")
    assert ["magmoms" in s.labels for s in read] == [True, False, True]
    assert labels_of(read[0], {}).magmoms_weight.tolist() == [1, 0]
    assert labels_of(read[1], {}).magforces_weight.tolist() == [0, 1]
    found = {f.code for f in structures.check(read).findings}
    assert "large-magmoms" in found
    frames[0].arrays["REF_magmoms"][0] = np.inf
    ase.io.write(tmp_path / "data.xyz", frames)
    with pytest.raises(PathtuneError, match="magmoms is not finite"):
        structures.read(tmp_path / "data.xyz")


def test_check_notes_moments_that_the_model_does_not_predict():
    labelled = [SIGNED, VECTORS]
    energies = [{"energy": np.zeros(())} for _ in labelled]
    (found,) = (
        f
        for f in structures.check(labelled, predictions=energies).findings
        if f.code == "unpredicted-labels"
    )
    assert found.severity == "note"
    assert "2 structures have magmoms" in found.message
    moments = [{"magmoms": np.zeros(s.n_atoms)} for s in labelled]
    for predictions in (None, moments):
        report = structures.check(labelled, predictions=predictions)
        assert not any(f.code == "unpredicted-labels" for f in report.findings)


def test_weights_that_no_trained_property_depends_on_are_not_alive():
    path = (Path(0, 2, (1, 2), "0e", "0e"),)
    weights = [
        PathWeight("a", (1, 2), "linear", "interaction", 0, path),
        PathWeight(
            "moments", (1, 2), "linear", "readout", None, path, properties=("magmoms",)
        ),
        PathWeight("never", (1, 2), "linear", "interaction", 1, path, properties=()),
    ]

    def alive(*properties):
        return set(alive_entries(weights, "all", ["H"], None, properties))

    assert alive("energy", "forces") == {"a"}
    assert alive("energy", "magmoms") == alive("magmoms") == {"a", "moments"}
