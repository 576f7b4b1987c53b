"""Fewer key/value heads from many."""
