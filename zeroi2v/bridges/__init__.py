"""One file per foreign format: its names, its config, and what in it has no place in a VideoViT."""
