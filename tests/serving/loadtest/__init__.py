"""Tests of `serving/loadtest`."""
