"""Figures of a run: one file each, drawn from the run folder alone.

A file has ``SECTION``, the part of the page it belongs to (see
`pathtune.report.page.SECTIONS`), and ``draw(run)``, which returns a
`pathtune.report.drawing.Drawing`, or None where the run has nothing to draw. Within a
section the page shows them in the order of their names.
"""
