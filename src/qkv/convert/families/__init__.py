"""What the families of transformers call their tensors, and what follows from fewer heads."""
