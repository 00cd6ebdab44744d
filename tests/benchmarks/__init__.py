"""Benchmarks that print ratios; never run as tests."""
