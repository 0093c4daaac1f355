"""Whose model? One file a family; the file's name is the backend's name."""
