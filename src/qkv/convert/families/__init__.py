"""Model families of transformers: tensor names and layouts, and how configurations express KV heads."""
