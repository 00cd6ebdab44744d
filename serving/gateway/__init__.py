"""One process, one port: knows gRPC, not Ray."""
