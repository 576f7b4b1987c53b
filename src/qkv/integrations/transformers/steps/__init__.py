"""Models of transformers in few calls of the kernel: attention modules, decoder layers, all layers of a step."""
