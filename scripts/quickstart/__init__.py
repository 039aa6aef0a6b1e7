"""The steps behind ``scripts/quickstart.sh``."""
