"""A survey: what one pass over the data leaves, a few numbers for each structure."""

from __future__ import annotations

import hashlib
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import chemical_symbols

from pathtune.properties import BY_ATOM, PARTIAL, PROPERTIES, Property, Structure


@dataclass(frozen=True, eq=False)
class Survey:
    """What checks, reference energies and batches need to know of every structure.

    About a hundred bytes a structure, whatever its size, so that data that do not fit
    in memory are gone through once and not once for each question.

    Parameters
    ----------
    n_atoms
        (n_structures,) atoms.
    n_labelled
        Property -> (n_structures,) atoms with a label, where single ones may lack it.
    labelled
        Property -> (n_structures,) whether the label is there.
    weights
        Property -> (n_structures,) `Structure.term_weight`.
    energies
        (n_structures,) eV; NaN without a label.
    composition
        (n_structures,) row of `compositions`.
    compositions
        (n_compositions, 118) atoms by atomic number less one.
    is_lone_atom, is_tagged, is_degenerate
        (n_structures,) see the functions; tagged is ``IsolatedAtom``.
    kinds
        (n_structures,) checksum of species and periodicity.
    places
        (n_structures, 2) projections of positions and cell on fixed directions (Å).
    digests
        (n_structures, 32) SHA-256 of the content.
    label_keys
        The key each label was found under.
    """

    n_atoms: np.ndarray
    n_labelled: Mapping[Property, np.ndarray]
    labelled: Mapping[Property, np.ndarray]
    weights: Mapping[Property, np.ndarray]
    energies: np.ndarray
    composition: np.ndarray
    compositions: np.ndarray
    is_lone_atom: np.ndarray
    is_tagged: np.ndarray
    is_degenerate: np.ndarray
    kinds: np.ndarray
    places: np.ndarray
    digests: np.ndarray
    label_keys: Mapping[Property, str]

    def __len__(self) -> int:
        return len(self.n_atoms)

    @property
    def elements(self) -> tuple[str, ...]:
        """Symbols in the data, by atomic number."""
        used = self.compositions[np.unique(self.composition)]
        present = np.flatnonzero(used.any(axis=0)) + 1
        return tuple(chemical_symbols[z] for z in present)

    @property
    def counts(self) -> dict[Property, int]:
        """Number of structures that carry each label."""
        return {name: int(there.sum()) for name, there in self.labelled.items()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content of all structures, in order."""
        return hashlib.sha256(self.digests.tobytes()).hexdigest()

    def rows(
        self, name: Property, chosen: Sequence[int] | slice = slice(None)
    ) -> np.ndarray:
        """Return how many structures or atoms enter a term of the loss, by structure.

        The loss averages over them; a label of weight zero does not count.
        """
        counts = self.labelled[name][chosen] & (self.weights[name][chosen] > 0)
        if name in BY_ATOM:
            return counts * self.n_labelled.get(name, self.n_atoms)[chosen]
        return counts

    def take(self, rows: Sequence[int] | np.ndarray) -> Survey:
        """Return the survey of some of the structures."""
        rows = np.asarray(rows, dtype=int)
        labelled = {name: there[rows] for name, there in self.labelled.items()}
        return Survey(
            n_atoms=self.n_atoms[rows],
            n_labelled={name: n[rows] for name, n in self.n_labelled.items()},
            labelled=labelled,
            weights={name: weight[rows] for name, weight in self.weights.items()},
            energies=self.energies[rows],
            composition=self.composition[rows],
            compositions=self.compositions,
            is_lone_atom=self.is_lone_atom[rows],
            is_tagged=self.is_tagged[rows],
            is_degenerate=self.is_degenerate[rows],
            kinds=self.kinds[rows],
            places=self.places[rows],
            digests=self.digests[rows],
            label_keys={
                name: key
                for name, key in self.label_keys.items()
                if labelled[name].any()
            },
        )


def survey(structures: Sequence[Structure]) -> Survey:
    """Go through the structures once; a store remembers the result."""
    remembered = getattr(structures, "survey", None)
    return remembered if isinstance(remembered, Survey) else conduct(structures)


def conduct(structures: Sequence[Structure]) -> Survey:
    """Go through the structures; nothing but the survey is kept of them."""
    columns = ("n_atoms", "composition", "kinds", *PARTIAL)
    integers = {name: array("q") for name in columns}
    flags = {name: bytearray() for name in (*PROPERTIES, *_FLAGS)}
    numbers = {name: array("d") for name in (*PROPERTIES, "energies", "places")}
    digests = bytearray()
    rows: dict[bytes, int] = {}
    label_keys: dict[Property, str] = {}
    for s in structures:
        species = np.asarray(s.atoms.numbers, "<i8")
        formula = np.bincount(species - 1, minlength=118).astype(np.int32)
        integers["n_atoms"].append(s.n_atoms)
        for label in PARTIAL:
            integers[label].append(int(has_label(s, label).sum()))
        integers["composition"].append(rows.setdefault(formula.tobytes(), len(rows)))
        integers["kinds"].append(zlib.crc32(species.tobytes() + s.atoms.pbc.tobytes()))
        for label in PROPERTIES:
            flags[label].append(label in s.labels)
            numbers[label].append(s.term_weight(label))
        for name, question in _FLAGS.items():
            flags[name].append(question(s))
        numbers["energies"].append(float(s.labels.get("energy", np.nan)))
        numbers["places"].extend(_place(s))
        digests += digest(s)
        label_keys |= s.label_keys
    as_bool = {name: np.frombuffer(bytes(x), dtype=bool) for name, x in flags.items()}
    as_float = {name: np.frombuffer(x.tobytes()) for name, x in numbers.items()}
    as_int = {
        name: np.frombuffer(x.tobytes(), dtype=np.int64) for name, x in integers.items()
    }
    return Survey(
        n_atoms=as_int["n_atoms"],
        n_labelled={name: as_int[name] for name in PARTIAL},
        labelled={name: as_bool[name] for name in PROPERTIES},
        weights={name: as_float[name] for name in PROPERTIES},
        energies=as_float["energies"],
        composition=as_int["composition"],
        compositions=np.frombuffer(b"".join(rows), np.int32).reshape(-1, 118),
        **{name: as_bool[name] for name in _FLAGS},
        kinds=as_int["kinds"],
        places=as_float["places"].reshape(-1, 2),
        digests=np.frombuffer(bytes(digests), np.uint8).reshape(-1, 32),
        label_keys=label_keys,
    )


def has_label(s: Structure, name: Property) -> np.ndarray:
    """Return which atoms have a label that single ones may lack; (n_atoms,) or (0,)."""
    label = np.asarray(s.labels.get(name, np.zeros(0)))
    return np.isfinite(label.sum(axis=tuple(range(1, label.ndim))))


def digest(s: Structure) -> bytes:
    """Return the SHA-256 of species, positions, cell, periodicity, spins and labels."""
    found = hashlib.sha256()
    parts: dict[str, np.ndarray] = {
        "numbers": np.asarray(s.atoms.numbers, "<i8"),
        "positions": s.atoms.positions,
        "cell": s.atoms.cell[:],
        "pbc": np.asarray(s.atoms.pbc, "<i8"),
        **{name: s.labels[name] for name in PROPERTIES if name in s.labels},
    }
    if s.atoms.has("initial_magmoms"):
        parts["initial_magmoms"] = s.atoms.get_initial_magnetic_moments()
    for name, values in parts.items():
        if values.dtype.kind == "f":
            values = np.asarray(values, "<f8") + 0.0  # one zero, not two
        found.update(f"{name}{values.shape};".encode())
        found.update(values.tobytes())
    return found.digest()


def is_lone_atom(structure: Structure) -> bool:
    """Whether a frame is one atom, not periodic or tagged ``IsolatedAtom``."""
    free = not structure.atoms.pbc.any()
    return structure.n_atoms == 1 and (free or is_tagged(structure))


def is_tagged(structure: Structure) -> bool:
    """Whether a frame has the config type ``IsolatedAtom``."""
    return structure.config_type.lower() == "isolatedatom"


def is_degenerate(structure: Structure) -> bool:
    """Whether a periodic direction has no cell vector, or the cell no volume."""
    cell = structure.atoms.cell
    missing = structure.atoms.pbc & (np.abs(cell[:]).max(axis=1) == 0)
    return bool(missing.any() or abs(np.linalg.det(cell.complete())) < 1e-6)


_FLAGS: Mapping[str, Callable[[Structure], bool]] = {
    "is_lone_atom": is_lone_atom,
    "is_tagged": is_tagged,
    "is_degenerate": is_degenerate,
}


def directions(n_atoms: int) -> np.ndarray:
    """Return the directions of `Survey.places`, (3 * n_atoms + 9, 2)."""
    return np.cos(np.outer(np.arange(3 * n_atoms + 9), (1.0, 1.7)))


def _place(s: Structure) -> np.ndarray:
    place = np.concatenate([s.atoms.positions.ravel(), s.atoms.cell[:].ravel()])
    return place @ directions(s.n_atoms)
