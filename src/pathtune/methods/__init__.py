"""How may the weights move? One file a method; the file's name is its name."""
