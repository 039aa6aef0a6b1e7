"""Pictures of what a backbone sees: ``python -m dinov2.eval.pictures``; docs/evaluation.md shows them."""
