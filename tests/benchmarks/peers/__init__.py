"""Comparable servers beside ours: the same graphs, the same load, the same run."""
