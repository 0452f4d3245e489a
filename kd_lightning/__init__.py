"""Knowledge distillation for people who train with PyTorch Lightning."""

__version__ = "0.1.0"
