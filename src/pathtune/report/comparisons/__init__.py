"""Figures of several runs: as `pathtune.report.figures`, with ``draw(runs)``."""
