"""Tests of `serving/gateway`."""
