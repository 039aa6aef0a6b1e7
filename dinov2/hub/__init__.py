"""The released models by name, for ``torch.hub`` and for direct use."""
