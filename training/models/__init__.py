"""p(x, z) in its forms. No objective is known here."""
