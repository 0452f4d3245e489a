"""Sentences: tokenizers, encoding, augmentation, and their data module."""
