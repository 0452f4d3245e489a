"""The ground floor: files, checksums, processes, signals, errors; nothing about distillation."""
