"""Mirrors the package `training.bench` file by file."""
