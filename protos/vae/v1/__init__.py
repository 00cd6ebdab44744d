"""Version 1 of the typed API: `vae.proto` and the stubs generated from it."""
