"""One static page on a run, or on several side by side; ``python -m dinov2.eval.compare`` writes it.

:mod:`collect` reads what a run left behind, :mod:`charts` turns it into figures and tables, :mod:`svg` draws,
:mod:`page` puts the page together.
"""
