"""The spin layer on a base without energy: equations, symmetry, derivatives, use."""

from __future__ import annotations

import ase
import ase.build
import numpy as np
import pytest
import torch
from rich.console import Console

from pathtune.backends.base import Backend
from pathtune.config import validate
from pathtune.errors import PathtuneError, UsageError
from pathtune.prediction import predict
from pathtune.properties import Structure
from pathtune.spin.backend import SpinBackend, spins_of
from pathtune.spin.config import SpinConfig
from pathtune.spin.fit import fit, solve
from pathtune.spin.layer import COUPLING, SQUARE, SpinLayer, SpinOutput
from pathtune.spin.relax import relax_spins
from pathtune.testing import spin_symmetry_errors
from pathtune.training.data import Frames
from tests.lattice import LatticeBackend
from tests.reference import spin_energy

MODES = {
    "moments": SpinConfig(width=8),
    "Heisenberg": SpinConfig(width=8, biquadratic=False, longitudinal=False),
    "spin-orbit": SpinConfig(width=8, spin_orbit=True),
    "directions": SpinConfig(width=8, spins="directions", spin_orbit=True),
    "none": SpinConfig(width=8, spins="none"),
}
every_mode = pytest.mark.parametrize("config", MODES.values(), ids=MODES)
with_spins = pytest.mark.parametrize(
    "config", [c for c in MODES.values() if c.spins != "none"], ids=list(MODES)[:-1]
)


def oxide(seed: int = 0, repeat: int = 1) -> ase.Atoms:
    """A skewed, rattled cell of iron and oxygen; vector spins, some of them zero."""
    generator = np.random.default_rng(seed)
    atoms = ase.build.bulk("FeO", "rocksalt", a=4.3, cubic=True) * (1, 1, repeat)
    skew = np.eye(3) + 0.05 * generator.normal(size=(3, 3))
    atoms.set_cell(atoms.cell @ skew, scale_atoms=True)
    atoms.rattle(0.1, seed=seed)
    spins = 1.5 * generator.normal(size=(len(atoms), 3))
    spins[np.flatnonzero(atoms.numbers == 8)[::2]] = 0
    atoms.arrays.pop("initial_magmoms", None)
    atoms.set_initial_magnetic_moments(spins)
    return atoms


def loaded(config: SpinConfig, layer: type[SpinLayer] = SpinLayer) -> SpinBackend:
    backend = SpinBackend(LatticeBackend(), config)
    backend.layer.__class__ = layer
    return backend


def shaken(backend: SpinBackend) -> dict[str, torch.Tensor]:
    """Parameters of the layer away from their start."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: p + 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in backend.spin_parameters().items()
    }


# Start


@every_mode
def test_the_start_is_the_base(config):
    backend = loaded(config)
    atoms = oxide()
    found = predict(backend, [Structure(atoms)])[0]
    assert found["energy"] == 0
    assert not found["forces"].any()
    assert not found["stress"].any()
    if config.spins == "moments":
        assert np.array_equal(found["magmoms"], atoms.get_initial_magnetic_moments())
    if config.spins != "none":
        assert not found["magforces"].any()


def test_directions_start_as_unit_vectors():
    atoms = oxide()
    found = predict(loaded(MODES["directions"]), [Structure(atoms)])[0]["magmoms"]
    spins = atoms.get_initial_magnetic_moments()
    lengths = np.linalg.norm(spins, axis=1)
    softened = np.sqrt(lengths**2 + 0.05**2)
    assert np.allclose(found, spins / softened[:, None], atol=1e-12)


@every_mode
def test_every_parameter_is_reached_after_a_step(config):
    backend = loaded(config)
    layer = backend.layer.requires_grad_(True)
    weights = {n: p.requires_grad_() for n, p in shaken(backend).items()}
    batch = backend.batch([backend.graph(oxide())])
    out = backend.predict(batch, weights, backend.properties, training=True)
    loss = torch.stack([(v**2).sum() for v in out.values() if v.requires_grad]).sum()
    for gradient in torch.autograd.grad(loss, list(weights.values())):
        assert gradient.isfinite().all()
        assert gradient.any()
    assert backend.new_parameters == sum(p.numel() for p in layer.parameters())


def test_equal_seeds_start_equally_and_leave_the_random_state_alone():
    before = torch.get_rng_state()
    first, again, other = (
        SpinBackend(LatticeBackend(), MODES["moments"], seed).spin_parameters()
        for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "spin.embedding.weight"
    assert not torch.equal(first[name], other[name])


# Equations


def test_the_layer_against_its_twin():
    backend = loaded(MODES["spin-orbit"])
    atoms = oxide()
    features, layer = backend.landscape(atoms, shaken(backend))
    spins = torch.from_numpy(atoms.get_initial_magnetic_moments())
    with torch.no_grad():
        found = layer(features, spins)
        exchange = layer.exchange(features, spins)
        nodes = layer._nodes(features)
        pairs = layer._pairs(features, nodes)
        square = (spins**2).sum(1, keepdim=True)
        length = torch.cat([nodes, square / (SQUARE + square)], 1)
        a = 1 + layer.length(length)[:, 0].numpy()
        b, c = layer.mixing(pairs.directed).T.numpy()
        alpha = layer.anisotropy(pairs.directed)[:, 0].numpy()
        terms = layer.couplings(pairs.hidden)
        terms[:, :3] += layer.distances(pairs.radial)
        terms = COUPLING * terms.numpy()
        w = layer.polar(pairs.directed).numpy()
        site = COUPLING * SQUARE * layer.site(nodes).numpy()
    index = exchange.pairs.T.numpy()
    vectors = exchange.vectors.numpy()
    r = np.linalg.norm(vectors, axis=1)
    units = vectors / r[:, None]
    x = r / 4.0
    cutoff = 1 - 28 * x**6 + 48 * x**7 - 21 * x**8
    m = spin_energy.moments(spins.numpy(), index, units, cutoff, a, b, c)
    v = spin_energy.polar_vectors(len(atoms), index, units, cutoff, w)
    dee = spin_energy.dzyaloshinskii_moriya(index, units, cutoff, terms[:, 3:], v)
    square = (m**2).sum(1) / SQUARE
    jay = terms[:, 0] + terms[:, 1] * square[index].sum(1)
    energy = spin_energy.energy(
        *(m, index, units, cutoff, jay, terms[:, 2], dee),
        *(COUPLING * alpha, site),
    )
    assert np.allclose(found.moments, m, atol=1e-12)
    assert np.allclose(exchange.heisenberg, cutoff * jay, atol=1e-14)
    assert np.allclose(exchange.biquadratic, cutoff * terms[:, 2], atol=1e-14)
    assert np.allclose(exchange.dzyaloshinskii_moriya, dee, atol=1e-14)
    assert float(found.energy) == pytest.approx(energy, rel=1e-12)


def test_couplings_are_symmetric_and_dzyaloshinskii_moriya_is_not():
    backend = loaded(MODES["spin-orbit"])
    found = backend.exchange(oxide(), shaken(backend))
    back = {
        (int(i), int(j), *np.round(v.numpy(), 9) + 0.0): n
        for n, ((i, j), v) in enumerate(zip(found.pairs.T, found.vectors, strict=True))
    }
    reverse = [
        back[(int(j), int(i), *np.round(-v.numpy(), 9) + 0.0)]
        for (i, j), v in zip(found.pairs.T, found.vectors, strict=True)
    ]
    assert len(set(reverse)) == len(reverse)
    for even in (found.heisenberg, found.biquadratic):
        assert torch.allclose(even[reverse], even, atol=1e-14)
        assert even.abs().max() > 1e-3
    odd = found.dzyaloshinskii_moriya
    assert torch.allclose(odd[reverse], -odd, atol=1e-14)
    assert odd.abs().max() > 1e-4


def test_no_dzyaloshinskii_moriya_where_a_bond_has_a_centre_of_inversion():
    backend = loaded(MODES["spin-orbit"])
    atoms = ase.build.bulk("FeO", "rocksalt", a=4.3, cubic=True)
    found = backend.exchange(atoms, shaken(backend))
    same = atoms.numbers[found.pairs[0]] == atoms.numbers[found.pairs[1]]
    assert found.dzyaloshinskii_moriya[same].abs().max() < 1e-12


# Symmetry


@every_mode
def test_symmetry(config):
    backend = loaded(config)
    found = spin_symmetry_errors(backend, Structure(oxide()), shaken(backend))
    rotation = found.pop("spin rotation")
    assert max(found.values()) < 1e-8
    if config.spin_orbit:
        assert rotation > 1e-3  # spins are coupled to the lattice
    else:
        assert rotation < 1e-8


class PolarMoments(SpinLayer):
    """Moments as polar vectors: what others got wrong."""

    def forward(self, features, spins):
        nodes = self._nodes(features)
        polar = self._polar_vectors(self._pairs(features, nodes))[:, 0]
        out = super().forward(features, spins)
        return SpinOutput(out.energy, out.moments + polar)


class OddEnergy(SpinLayer):
    """An energy that is linear in the spins."""

    def forward(self, features, spins):
        out = super().forward(features, spins)
        odd = features.energy.index_add(0, features.structure, out.moments.sum(1))
        return SpinOutput(out.energy + odd, out.moments)


def test_controls_fail():
    config = MODES["spin-orbit"]
    structure = Structure(oxide())
    polar = loaded(config, PolarMoments)
    found = spin_symmetry_errors(polar, structure, shaken(polar))
    assert found["inversion"] > 1e-2
    assert found["rotation"] < 1e-8  # what rotations alone would not have shown
    odd = loaded(config, OddEnergy)
    found = spin_symmetry_errors(odd, structure, shaken(odd))
    assert found["time reversal"] > 1e-2
    assert found["inversion"] < 1e-8


# Derivatives


@with_spins
def test_derivatives(config):
    backend = loaded(config)
    weights = shaken(backend)
    atoms = oxide()

    def energies(changed):
        frames = [Structure(a) for a in changed]
        found = predict(backend, frames, weights=weights, properties=["energy"])
        return [float(p["energy"]) for p in found]

    def slope(change, step=1e-4):
        changed = []
        for sign in (1, -1):
            copy = atoms.copy()
            change(copy, sign * step)
            changed.append(copy)
        plus, minus = energies(changed)
        return (plus - minus) / (2 * step)

    found = predict(backend, [Structure(atoms)], weights=weights)[0]
    for atom, axis in ((0, 0), (3, 1), (6, 2)):

        def move(copy, step, atom=atom, axis=axis):
            copy.positions[atom, axis] += step

        def turn(copy, step, atom=atom, axis=axis):
            copy.arrays["initial_magmoms"][atom, axis] += step

        scale = np.abs(found["forces"]).max()
        force = pytest.approx(found["forces"][atom, axis], abs=1e-6 * scale)
        assert -slope(move) == force
        scale = np.abs(found["magforces"]).max()
        force = pytest.approx(found["magforces"][atom, axis], abs=1e-6 * scale)
        assert -slope(turn) == force

    def strain(copy, step):
        change = np.eye(3)
        change[0, 2] = change[2, 0] = step / 2
        copy.set_cell(copy.cell @ change, scale_atoms=True)

    stress = slope(strain) / atoms.get_volume()
    assert stress == pytest.approx(found["stress"][4], rel=1e-5)


def test_smooth_at_the_cutoff():
    backend = loaded(MODES["spin-orbit"])
    weights = shaken(backend)
    step = 1e-3

    def second_slope(r):
        """Of the energy of two atoms."""
        frames = [
            Structure(ase.Atoms("Fe2", [[0, 0, 0], [0, 0, r + n * step]]))
            for n in (-1, 0, 1)
        ]
        for frame in frames:
            frame.atoms.set_initial_magnetic_moments([[1, 0, 0], [0.6, 0, 0.8]])
        found = predict(backend, frames, weights=weights, properties=["energy"])
        minus, zero, plus = (float(p["energy"]) for p in found)
        return (plus - 2 * zero + minus) / step**2

    inside, before = abs(second_slope(3.0)), abs(second_slope(4.0 - 2 * step))
    assert inside > 1e-3
    assert before < 0.05 * inside
    assert second_slope(4.0 + 2 * step) == 0


# Input


def test_batches_are_single_structures():
    backend = loaded(MODES["spin-orbit"])
    weights = shaken(backend)
    plain = oxide(2)
    del plain.arrays["initial_magmoms"]
    frames = [Structure(a) for a in (oxide(0), oxide(1, repeat=2), plain)]
    together = predict(backend, frames, weights=weights)
    alone = predict(backend, frames, weights=weights, batch_size=1)
    for one, many in zip(alone, together, strict=True):
        for name in one:
            assert np.allclose(one[name], many[name], atol=1e-12)
    # Without spins there is no exchange, and no moment.
    assert together[2]["energy"] == 0
    assert not together[2]["magmoms"].any()


def test_scalars_are_vectors_along_z():
    backend = loaded(MODES["moments"])
    weights = shaken(backend)
    vectors, scalars = oxide(), oxide()
    collinear = np.array([1.0, -2.0, 0.0, 0.5, -1.0, 0.0, 2.0, 1.0])
    vectors.set_initial_magnetic_moments(collinear[:, None] * [0, 0, 1])
    del scalars.arrays["initial_magmoms"]
    scalars.set_initial_magnetic_moments(collinear)
    a, b = predict(backend, [Structure(vectors), Structure(scalars)], weights=weights)
    for name in a:
        assert np.allclose(a[name], b[name], atol=1e-12)
    assert b["magmoms"].shape == (8, 3)


def test_magnitudes_without_spins():
    backend = loaded(MODES["none"])
    found = predict(backend, [Structure(oxide())], weights=shaken(backend))[0]
    assert found["magmoms"].shape == (8,)
    assert (found["magmoms"] > 0).all()
    assert found["energy"] == 0
    assert "magforces" not in found
    with pytest.raises(UsageError, match="no exchange"):
        backend.exchange(oxide(), {})
    with pytest.raises(UsageError, match="no energy of spins"):
        relax_spins(backend, {}, oxide())


def test_wrong_input_is_refused():
    class NoFeatures(LatticeBackend):
        features = Backend.features

    with pytest.raises(UsageError, match="does not expose node features"):
        SpinBackend(NoFeatures(), SpinConfig())
    with pytest.raises(UsageError, match=r"r_max = 5 Å"):
        SpinBackend(LatticeBackend(), SpinConfig(r_max=5))
    atoms = oxide()
    atoms.arrays["initial_magmoms"][0] = np.nan
    with pytest.raises(PathtuneError, match="not finite"):
        loaded(MODES["moments"]).graph(atoms)
    atoms.arrays["initial_magmoms"][:] = 0
    with pytest.raises(UsageError, match="no atom has a spin"):
        relax_spins(loaded(MODES["moments"]), {}, atoms)


def test_the_calculator():
    backend = loaded(MODES["spin-orbit"])
    weights, atoms = shaken(backend), oxide()
    expected = predict(backend, [Structure(atoms)], weights=weights)[0]
    atoms.calc = backend.calculator(weights, {"Fe": -1.0})
    energy = atoms.get_potential_energy()
    assert energy == pytest.approx(float(expected["energy"]) - 4)
    results = atoms.calc.results
    assert results["free_energy"] == energy
    assert np.array_equal(atoms.get_forces(), expected["forces"])
    assert np.array_equal(atoms.get_stress(), expected["stress"])
    assert np.array_equal(atoms.get_magnetic_moments(), expected["magmoms"])
    assert np.array_equal(results["magnetic_forces"], expected["magforces"])
    atoms.set_initial_magnetic_moments(np.roll(atoms.get_initial_magnetic_moments(), 1))
    assert atoms.get_potential_energy() != energy


# Physics


class KnownSpins:
    """J, K and D as functions of distance, up to 3.8 Å."""

    @staticmethod
    def _fading(r):
        x = ((r - 3.3) / 0.5).clamp(0, 1)
        return torch.exp((2.5 - r) / 0.6) * (1 - x**3 * (10 - 15 * x + 6 * x**2))

    def heisenberg(self, r):
        return 0.02 * self._fading(r)

    def biquadratic(self, r):
        return -0.003 * self._fading(r)

    def dzyaloshinskii_moriya(self, features):
        i, j = features.pairs
        r = features.vectors.norm(dim=1, keepdim=True)
        units = features.vectors / r
        v = torch.zeros(len(features.scalars), 3).to(r)
        v = v.index_add(0, i, self._fading(r) * units)
        return 0.01 * self._fading(r) * torch.linalg.cross(v[i] + v[j], units)

    def isotropic_energy(self, features, spins):
        i, j = features.pairs
        r = features.vectors.norm(dim=1)
        dot = (spins[i] * spins[j]).sum(1)
        terms = self.heisenberg(r) * dot + self.biquadratic(r) * dot**2
        return self._by_structure(features, terms / 2)

    def energy(self, features, spins):
        i, j = features.pairs
        cross = torch.linalg.cross(spins[i], spins[j])
        terms = (self.dzyaloshinskii_moriya(features) * cross).sum(1)
        twisted = self._by_structure(features, terms / 2)
        return self.isotropic_energy(features, spins) + twisted

    @staticmethod
    def _by_structure(features, terms):
        zeros = torch.zeros_like(features.energy)
        return zeros.index_add(0, features.structure[features.pairs[0]], terms)


N_FRAMES = 10
ALL_BUT_MOMENTS = ("energy", "forces", "stress", "magforces")
QUIET = Console(quiet=True)


def lattice(seed: int) -> ase.Atoms:
    """A distorted bcc lattice with random unit spins."""
    generator = np.random.default_rng(seed)
    atoms = ase.build.bulk("Fe", a=2.87, cubic=True) * (2, 2, 2)
    atoms.positions += generator.uniform(-0.1, 0.1, size=(len(atoms), 3))
    spins = generator.normal(size=(len(atoms), 3))
    spins /= np.linalg.norm(spins, axis=1, keepdims=True)
    del atoms.arrays["initial_magmoms"]
    atoms.set_initial_magnetic_moments(spins)
    return atoms


def magnetic_forces(energy, spins):
    return -torch.autograd.grad(energy.sum(), spins, create_graph=True)[0]


@pytest.fixture(scope="module")
def learned():
    """A layer trained on energies and magnetic forces."""
    known = KnownSpins()
    config = SpinConfig(spin_orbit=True, width=16, n_vectors=1, longitudinal=False)
    backend = SpinBackend(LatticeBackend(), config)
    batch = backend.batch([backend.graph(lattice(seed)) for seed in range(N_FRAMES)])
    features = backend.base.features(batch.base, {}).detached()
    spins = batch.spins.requires_grad_()
    energies = known.energy(features, spins)
    labels = energies.detach(), magnetic_forces(energies, spins).detach()
    # Without the part that least squares give, which the test below is about.
    parameters = [
        p.requires_grad_(True)
        for name, p in backend.layer.named_parameters()
        if not name.startswith("distances")
    ]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=500,
        history_size=100,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss():
        optimizer.zero_grad()
        energy, moments = backend.layer(features, spins)
        out = energy, magnetic_forces(energy, spins)
        total = 10 * ((moments - spins) ** 2).mean()
        for value, label in zip(out, labels, strict=True):
            total = total + ((value - label) ** 2).mean() / label.var()
        total.backward(inputs=parameters)
        return total

    optimizer.step(loss)
    backend.layer.requires_grad_(False)
    return backend, known


def test_known_couplings_are_recovered(learned):
    backend, known = learned
    for seed in range(N_FRAMES):
        found = backend.exchange(lattice(seed), {})
        r = found.vectors.norm(dim=1)
        sampled = r < 3.3  # two shells; the third begins at 3.7
        j = known.heisenberg(r)[sampled]
        assert ((found.heisenberg[sampled] - j).abs() < 0.03 * j.abs()).all()
    features, _ = backend.landscape(lattice(99), {})
    found = backend.exchange(lattice(99), {})
    pairs = {
        "heisenberg": known.heisenberg(found.vectors.norm(dim=1)),
        "biquadratic": known.biquadratic(found.vectors.norm(dim=1)),
        "dzyaloshinskii_moriya": known.dzyaloshinskii_moriya(features),
    }
    for name, expected in pairs.items():
        error = getattr(found, name) - expected
        assert error.norm() < 0.05 * expected.norm(), name


def test_least_squares_find_couplings_of_distance():
    known = KnownSpins()
    config = SpinConfig(width=8, longitudinal=False)
    backend = SpinBackend(LatticeBackend(), config)
    structures = []
    for seed in range(N_FRAMES):
        atoms = lattice(seed)
        features = backend.base.features(backend.batch([backend.graph(atoms)]).base, {})
        spins = spins_of(atoms).requires_grad_()
        energy = known.isotropic_energy(features, spins)
        slopes, spin_slopes = torch.autograd.grad(energy, (features.leaf, spins))
        forces, stress = features.forces_and_stress(slopes)
        labels = {
            "energy": energy.detach()[0],
            "forces": forces.detach(),
            "stress": stress[0].detach(),
            "magforces": -spin_slopes,
        }
        labels = {name: value.numpy() for name, value in labels.items()}
        structures.append(Structure(atoms, labels))
    frames = Frames.prepare(backend, structures)
    weights = fit(backend, frames, ALL_BUT_MOMENTS, QUIET)
    unseen = lattice(99)
    found = backend.exchange(unseen, weights)
    r = found.vectors.norm(dim=1)
    sampled = r < 3.3
    j = known.heisenberg(r)[sampled]
    assert ((found.heisenberg[sampled] - j).abs() < 0.01 * j).all()
    start = backend.exchange(unseen, backend.spin_parameters())
    assert not start.heisenberg.any()
    # Half of the labels by a nan, an energy by its absence: they are left out.
    structures[0].labels["magforces"][::2] = np.nan
    del structures[0].labels["energy"]
    again = fit(backend, Frames.prepare(backend, structures), ALL_BUT_MOMENTS, QUIET)
    assert all(value.isfinite().all() for value in again.values())
    assert fit(backend, frames, ["magmoms"], QUIET).keys() == weights.keys()


@pytest.mark.parametrize("ridge", [0.1, 1e-8])
def test_ridge_regression_against_its_twin(ridge, monkeypatch):
    monkeypatch.setattr("pathtune.spin.fit._RIDGES", [ridge])
    generator = np.random.default_rng(0)
    # (properties, folds, values, coefficients and the target)
    tables = generator.normal(size=(2, 5, 30, 7)) * 10.0 ** np.arange(7)
    tables[1, 2] = 0  # no labels of this property in this fold
    grams = np.einsum("pfva,pfvb->pfab", tables, tables)
    found = solve(torch.from_numpy(grams)).numpy()
    rows = [t.reshape(-1, 7) / np.linalg.norm(t[..., -1]) for t in tables]
    assert np.allclose(found, spin_energy.ridge(np.concatenate(rows), ridge))


def test_lengths_of_moments_are_fitted_first():
    config = MODES["directions"]
    backend = SpinBackend(LatticeBackend(), config)
    structures = []
    for seed in range(N_FRAMES):
        atoms = oxide(seed)
        spins = atoms.get_initial_magnetic_moments()
        directions = spins / (np.linalg.norm(spins, axis=1, keepdims=True) + 1e-9)
        lengths = np.where(atoms.numbers == 26, 2.2, 0.1)
        structures.append(Structure(atoms, {"magmoms": lengths[:, None] * directions}))
    frames = Frames.prepare(backend, structures)
    weights = fit(backend, frames, ["magmoms"], QUIET)
    found = predict(backend, structures, weights=weights)
    for prediction, structure in zip(found, structures, strict=True):
        error = prediction["magmoms"] - structure.labels["magmoms"]
        assert np.abs(error).mean() < 0.05


def test_the_ground_state_is_found(learned):
    backend, known = learned
    atoms = lattice(99)
    features, _ = backend.landscape(atoms, {})
    relaxed = relax_spins(backend, {}, atoms, n_starts=4)
    assert relaxed.torque < 1e-4
    assert min(relaxed.energies) == relaxed.energy
    spins = torch.from_numpy(relaxed.atoms.get_initial_magnetic_moments())
    assert torch.allclose(spins.norm(dim=1), torch.ones(16).double())
    # The two sublattices of bcc point against each other, canted by D.
    order = torch.tensor([1.0, -1.0] * 8).double() @ spins / 16
    assert order.norm() > 0.95
    energy = float(known.energy(features, spins))
    staggered = torch.tensor([[0, 0, 1.0], [0, 0, -1.0]] * 8).double()
    assert energy < float(known.energy(features, staggered))
    # No spin gains when it is turned in the known landscape.
    spins.requires_grad_()
    fields = magnetic_forces(known.energy(features, spins), spins).detach()
    torques = torch.linalg.cross(spins.detach(), fields).norm(dim=1)
    assert torques.max() < 0.02 * fields.norm(dim=1).mean()


def test_free_magnitudes_stay_bounded():
    backend = loaded(MODES["moments"])
    atoms = oxide()
    relaxed = relax_spins(
        backend, shaken(backend), atoms, magnitudes="free", n_starts=2
    )
    before, after = (
        np.linalg.norm(a.get_initial_magnetic_moments(), axis=1)
        for a in (atoms, relaxed.atoms)
    )
    assert after.max() < 1.5 * before.max() + 1e-9
    assert not after[before == 0].any()
    assert not np.allclose(after, before)
    start = predict(backend, [Structure(atoms)], weights=shaken(backend))[0]
    assert relaxed.energy < start["energy"]


def test_relaxing_needs_no_vectors():
    backend = loaded(MODES["moments"])
    atoms = oxide()
    del atoms.arrays["initial_magmoms"]
    atoms.set_initial_magnetic_moments([1.0, -1.0] * 4)
    relaxed = relax_spins(backend, shaken(backend), atoms, n_starts=1)
    assert relaxed.atoms.get_initial_magnetic_moments().shape == (8, 3)
    assert atoms.get_initial_magnetic_moments().shape == (8,)


def test_a_layer_of_other_equations_is_refused():
    assert validate(SpinConfig, SpinConfig().model_dump(), "spin setting").form == 2
    with pytest.raises(UsageError, match="'form' = 1"):
        validate(SpinConfig, {"form": 1}, "spin setting")
