"""Configuration: the schema of the keys, building objects, trust, catalog, numbers."""
