"""Evaluation on whole slides: bags of tile features, and what is learned from them."""
