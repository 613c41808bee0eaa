"""Models for elsewhere: ONNX, torch.export and two portable files, each checked against the original on the spot."""
