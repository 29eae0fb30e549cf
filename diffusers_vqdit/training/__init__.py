"""What the training scripts share. Inference needs nothing of it."""
