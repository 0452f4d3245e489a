"""Images: their store and their data module."""
