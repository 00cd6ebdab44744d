"""Proves it: `serving/` and `training/` here mirror the packages file by file."""
