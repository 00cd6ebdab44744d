"""Package `vae` of the wire contract."""
