"""Where examples come from: files, folders, the hub and data sets with a pinned address."""
