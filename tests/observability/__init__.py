"""What the service says of itself, checked against a real Prometheus."""
