"""Tests of training.study."""
