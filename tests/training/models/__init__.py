"""Mirrors the package `training.models` file by file."""
