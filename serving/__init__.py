"""Runs a bundle (an exported variational autoencoder) behind gRPC. Never imports torch."""
