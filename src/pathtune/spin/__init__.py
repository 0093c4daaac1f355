"""The spin-aware layer: exchange energies and moments on a non-magnetic model."""
