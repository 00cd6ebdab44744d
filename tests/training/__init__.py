"""Mirrors the package `training` file by file."""
