"""What all rooms stand on: files, seals, processes, signals, fingerprints. Nothing here knows of distillation."""
