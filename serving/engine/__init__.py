"""Who runs the rows: ONNX Runtime in this process, or Ray Serve deployments."""
