"""What benchmarks share: cases, peers, measuring, and the machine with its limits."""
