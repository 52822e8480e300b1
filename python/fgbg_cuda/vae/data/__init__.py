"""Data sets: images, their truth if there is one, and loaders."""
