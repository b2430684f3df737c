"""What several benchmarks use: the model, ways of adapting it, measuring, tables, progress."""
