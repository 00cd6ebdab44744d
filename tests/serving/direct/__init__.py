"""Tests of serving.direct."""
