"""Tests a running service under load: what was offered, what came back, whether it was right."""
