"""The whole path: train, export, serve, call."""
