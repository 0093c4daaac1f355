"""The spin layer: moments and exchange energies from a model's node features.

With spins s_i of the input, features h_i of the base, unit vectors r̂_ij from i to j and
f, a cutoff that is smooth to second order,

    m_i  = a(h_i, |s_i|²) s_i + Σ_j f [b_ij s_j + c_ij r̂_ij (r̂_ij·s_j)]
    E    = E_base + ½ Σ_ij f [J_ij m_i·m_j + K_ij (m_i·m_j)² + D_ij·(m_i × m_j)]
                  + Σ_i [m_i·A_i m_i + L(h_i, |m_i|²)]
    J_ij = J⁰_ij + J¹_ij (|m_i|² + |m_j|²)
    D_ij = Σ_k d_ij^k (v_i^k + v_j^k) × r̂_ij            v_i^k = Σ_j f w_ij^k r̂_ij
    A_i  = Σ_j f α_ij (r̂_ij r̂_ij - 1/3)

J⁰, J¹ and K are a network of the features plus a function of the distance alone.
c, D and A exist with spin-orbit coupling only; L and J¹ where the lengths of moments
matter. J, K and d are symmetric in i and j, so that D_ij = -D_ji; b, c, w and α belong
to the atom i. Everything is made of invariants under O(3) and of axial spins in pairs:
moments are axial and odd under time reversal, the energy is even. The forms of J, K, D
and A are those of Xiang et al., Dalton Trans. 42 (2013) 823; that D vanishes where a
bond has a centre of inversion is Moriya's first rule (Phys. Rev. 120 (1960) 91).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm, silu, softplus

from pathtune.backends.base import Features, undisturbed
from pathtune.spin.config import SpinConfig

# eV/μ_B²: what couplings are measured in inside the networks.
COUPLING = 0.01
# μ_B² for a moment whose length matters, in the energy of single atoms.
SQUARE = 4.0
# μ_B: a moment that is not much longer has no direction.
SHORTEST = 0.05
# Features are scaled to one; smaller ones than this are left small.
SMALLEST_FEATURE = 1e-2


class SpinOutput(NamedTuple):
    """What the layer adds to a batch.

    Parameters
    ----------
    energy
        (n_structures,) eV.
    moments
        (n_atoms_total, 3) μ_B, axial; or (n_atoms_total,) magnitudes where nothing is
        known of the spins.
    """

    energy: Tensor
    moments: Tensor


class Exchange(NamedTuple):
    """The couplings of pairs, every pair in both directions.

    The energy of the pairs is ½ Σ [J m_i·m_j + K (m_i·m_j)² + D·(m_i × m_j)], with the
    predicted moments m in μ_B; a positive J favours antiparallel moments. J is that of
    moments as long as they are in this structure.

    Parameters
    ----------
    pairs
        (2, n_pairs) atoms i and j.
    vectors
        (n_pairs, 3) from i to j (Å).
    heisenberg
        (n_pairs,) J (eV/μ_B²).
    biquadratic
        (n_pairs,) K (eV/μ_B⁴); zero without this term.
    dzyaloshinskii_moriya
        (n_pairs, 3) D (eV/μ_B²), axial; zero without spin-orbit coupling.
    """

    pairs: Tensor
    vectors: Tensor
    heisenberg: Tensor
    biquadratic: Tensor
    dzyaloshinskii_moriya: Tensor


class _Pairs(NamedTuple):
    """The pairs within the cutoff; i, j and their unit vectors."""

    i: Tensor
    j: Tensor
    vectors: Tensor
    units: Tensor
    cutoff: Tensor
    radial: Tensor
    hidden: Tensor
    directed: Tensor
    n_atoms: int


class SpinLayer(nn.Module):
    """See the module; at the start the energy is zero and moments are the spins.

    Parameters
    ----------
    config
        The settings.
    n_scalars
        Number of scalar features of an atom.
    r_max
        Cutoff (Å).
    seed
        Of the initial parameters.
    """

    def __init__(
        self, config: SpinConfig, n_scalars: int, r_max: float, seed: int
    ) -> None:
        super().__init__()
        self.config = config
        self.r_max = r_max
        with undisturbed(torch.float64):
            torch.manual_seed(seed)
            self._build(n_scalars)

    def _build(self, n_scalars: int) -> None:
        config, width = self.config, self.config.width
        self.embedding = nn.Linear(n_scalars, width)
        if config.spins == "none":
            self.magnitude = _head(width, width, 1)
            return
        self.sum = nn.Linear(width, width)
        self.product = nn.Linear(width, width, bias=False)
        self.radial = nn.Linear(config.n_radial, width, bias=False)
        self.centre = nn.Linear(width, width, bias=False)
        n_vectors = config.n_vectors if config.spin_orbit else 0
        n_couplings = 1 + config.longitudinal + config.biquadratic + n_vectors
        self.couplings = _head(width, width, n_couplings)
        self.mixing = _zero(width, 2 if config.spin_orbit else 1)
        self.length = _head(width + 1, width, 1)
        if config.spin_orbit:
            self.anisotropy = _zero(width, 1)
            self.polar = nn.Linear(width, n_vectors, bias=False)
        if config.longitudinal:
            self.site = _head(width, width, 3)
        self.distances = _zero(config.n_radial, n_couplings - n_vectors)

    def forward(self, features: Features, spins: Tensor) -> SpinOutput:
        """Return energies and moments.

        Parameters
        ----------
        features
            Of the base model.
        spins
            (n_atoms_total, 3) μ_B; see `SpinConfig.spins`.
        """
        nodes = self._nodes(features)
        if self.config.spins == "none":
            magnitudes = softplus(self.magnitude(nodes)).squeeze(-1)
            zero = magnitudes.new_zeros(len(features.energy))
            return SpinOutput(zero, magnitudes)
        pairs = self._pairs(features, nodes)
        moments = self._moments(nodes, pairs, self._inputs(spins))
        square = (moments**2).sum(1)
        energies = 0.5 * self._exchange_energies(pairs, moments)
        if self.config.spin_orbit:
            along = (pairs.units * moments[pairs.i]).sum(1)
            anisotropy = COUPLING * self.anisotropy(pairs.directed)[:, 0] * pairs.cutoff
            energies = energies + anisotropy * (along**2 - square[pairs.i] / 3)
        energy = spins.new_zeros(len(features.energy))
        energy = energy.index_add(0, features.structure[pairs.i], energies)
        if self.config.longitudinal:
            x = (square / SQUARE).unsqueeze(1)
            powers = torch.cat([x, x**2, x**3], 1)
            sites = COUPLING * SQUARE * (self.site(nodes) * powers).sum(1)
            energy = energy.index_add(0, features.structure, sites)
        return SpinOutput(energy, moments)

    def exchange(self, features: Features, spins: Tensor) -> Exchange:
        """Return the couplings of all pairs within the cutoff; see `forward`."""
        nodes = self._nodes(features)
        pairs = self._pairs(features, nodes)
        moments = self._moments(nodes, pairs, self._inputs(spins))
        j, k, d = self._couplings(pairs, moments)
        return Exchange(torch.stack([pairs.i, pairs.j]), pairs.vectors, j, k, d)

    def _inputs(self, spins: Tensor) -> Tensor:
        """Return the spins as the layer takes them; directions have a length of one."""
        if self.config.spins == "directions":
            return spins * torch.rsqrt((spins**2).sum(1, True) + SHORTEST**2)
        return spins

    def _nodes(self, features: Features) -> Tensor:
        scalars = features.scalars
        scaled = rms_norm(scalars, scalars.shape[1:], eps=SMALLEST_FEATURE**2)
        return silu(self.embedding(scaled))

    def _pairs(self, features: Features, nodes: Tensor) -> _Pairs:
        """Return the pairs within the cutoff with their hidden features."""
        lengths = features.vectors.norm(dim=1)
        near = torch.nonzero(lengths < self.r_max).flatten()
        vectors, lengths = features.vectors[near], lengths[near]
        i, j = features.pairs[:, near]
        x = (lengths / self.r_max).unsqueeze(1)
        order = torch.arange(1, self.config.n_radial + 1, device=x.device)
        # Bessel functions, Gasteiger et al., ICLR 2020 (arXiv 2003.03123), equation 7.
        radial = torch.sin(torch.pi * order * x) / x
        # Ibid., equation 8, with p = 6.
        cutoff = (1 - x**6 * (28 - 48 * x + 21 * x**2)).squeeze(1)
        half = self.sum(nodes)
        product = self.product(nodes[i] * nodes[j])
        hidden = silu(half[i] + half[j] + product + self.radial(radial))
        directed = silu(hidden + self.centre(nodes)[i])
        units = vectors / lengths.unsqueeze(1)
        return _Pairs(
            i, j, vectors, units, cutoff, radial, hidden, directed, len(nodes)
        )

    def _moments(self, nodes: Tensor, pairs: _Pairs, spins: Tensor) -> Tensor:
        square = (spins**2).sum(1, keepdim=True)
        # Between 0 and 1, whatever the length.
        length = square / (SQUARE + square)
        own = (1 + self.length(torch.cat([nodes, length], 1))) * spins
        mixing = self.mixing(pairs.directed) * pairs.cutoff.unsqueeze(1)
        neighbours = mixing[:, :1] * spins[pairs.j]
        if self.config.spin_orbit:
            along = (pairs.units * spins[pairs.j]).sum(1, keepdim=True)
            neighbours = neighbours + mixing[:, 1:2] * along * pairs.units
        return own.index_add(0, pairs.i, neighbours)

    def _couplings(
        self, pairs: _Pairs, moments: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return J and K, (n_pairs,), and D, (n_pairs, 3), times the cutoff."""
        terms = self.couplings(pairs.hidden)
        distances = self.distances(pairs.radial)
        terms = terms + pad(distances, (0, terms.shape[1] - distances.shape[1]))
        terms = COUPLING * terms * pairs.cutoff.unsqueeze(1)
        j, rest = terms[:, 0], terms[:, 1:]
        if self.config.longitudinal:
            square = (moments**2).sum(1) / SQUARE
            j = j + rest[:, 0] * (square[pairs.i] + square[pairs.j])
            rest = rest[:, 1:]
        k = torch.zeros_like(j)
        if self.config.biquadratic:
            k, rest = rest[:, 0], rest[:, 1:]
        d = torch.zeros_like(pairs.vectors)
        if self.config.spin_orbit:
            v = self._polar_vectors(pairs)
            both = torch.einsum("pk,pkx->px", rest, v[pairs.i] + v[pairs.j])
            d = torch.linalg.cross(both, pairs.units)
        return j, k, d

    def _polar_vectors(self, pairs: _Pairs) -> Tensor:
        """Return v, (n_atoms_total, n_vectors, 3).

        They are made here, from distances and directions alone: vector features of a
        base that knows rotations only, such as SevenNet-0, are not polar.
        """
        weights = self.polar(pairs.directed) * pairs.cutoff.unsqueeze(1)
        parts = weights.unsqueeze(2) * pairs.units.unsqueeze(1)
        zeros = parts.new_zeros(pairs.n_atoms, *parts.shape[1:])
        return zeros.index_add(0, pairs.i, parts)

    def _exchange_energies(self, pairs: _Pairs, moments: Tensor) -> Tensor:
        j, k, d = self._couplings(pairs, moments)
        first, second = moments[pairs.i], moments[pairs.j]
        product = (first * second).sum(1)
        energies = j * product + k * product**2
        if self.config.spin_orbit:
            energies = energies + (d * torch.linalg.cross(first, second)).sum(1)
        return energies


def _head(n_in: int, width: int, n_out: int) -> nn.Sequential:
    """Return a network whose last layer, and so its output, is zero."""
    return nn.Sequential(nn.Linear(n_in, width), nn.SiLU(), _zero(width, n_out))


def _zero(n_in: int, n_out: int) -> nn.Linear:
    layer = nn.Linear(n_in, n_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
