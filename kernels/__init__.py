"""Kernel generators, one operator per file."""
