"""Flower on jobs of each state."""
