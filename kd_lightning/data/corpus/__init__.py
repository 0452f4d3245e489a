"""Running text for language models: documents as tokens on disk, cut into blocks."""
