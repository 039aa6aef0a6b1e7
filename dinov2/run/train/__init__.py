"""Submission of training jobs."""
