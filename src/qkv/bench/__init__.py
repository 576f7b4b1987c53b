"""Measurement of attention calls, time and memory, for `qkv bench` and the benchmarks."""
