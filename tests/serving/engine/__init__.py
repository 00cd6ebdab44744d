"""Tests of `serving/engine`."""
