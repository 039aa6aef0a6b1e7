"""DINOv2 self-supervised training, adapted to histopathology."""

__version__ = "0.0.1"
