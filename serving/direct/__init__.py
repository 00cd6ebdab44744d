"""Runs between a gateway and its replicas without a detour: arrays as bytes over a connection of their own."""
