"""Names and layouts of the published system's tensors (PyTorch) ↔ paths and layouts here, in both directions."""
