"""From a composed configuration to objects: building, trust, catalog, and the numbers that keys accept."""
