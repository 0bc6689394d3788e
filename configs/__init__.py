"""Experiment cards: one file each, with `get_config(variant)`."""
