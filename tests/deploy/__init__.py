"""The manifests, as far as they can be proved without a cluster."""
