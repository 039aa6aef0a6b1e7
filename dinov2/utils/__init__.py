"""Helpers; `config.py` is the entry-tier set-up of a run, the others import nothing above themselves."""
