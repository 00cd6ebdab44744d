"""The Open Inference Protocol, as far as it is served: `inference.proto` and the stubs generated from it."""
