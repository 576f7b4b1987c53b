"""Times and memory of attention calls: what `qkv bench` and the benchmarks measure with."""
