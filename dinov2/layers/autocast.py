"""What autocast does where a layer asks."""

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the format to which autocast rounds what products on ``device`` take; None where it does not."""
    rounds = device.type != "meta" and torch.is_autocast_enabled(device.type)  # which knows no such device
    return torch.get_autocast_dtype(device.type) if rounds else None
