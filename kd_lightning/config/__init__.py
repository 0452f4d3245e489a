"""The schema of the keys, and from a composed configuration to objects: building, trust, catalog, numbers."""
