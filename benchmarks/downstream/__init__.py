"""Which way to choose helps, at equal steps and at equal minutes. `__main__` is the command."""
