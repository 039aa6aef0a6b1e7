"""Submission of evaluation jobs."""
