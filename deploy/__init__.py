"""What runs the service elsewhere, and what watches it."""
