"""Makes a bundle from data. Never imports Ray, gRPC or the wire contract."""
