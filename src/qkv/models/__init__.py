"""Language models for the command line: loading, downloading, generation, and KV cache sizes."""
