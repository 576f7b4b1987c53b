"""`qkv see`: what a model attends to on a text, and what windows or fewer KV heads would cost it."""
