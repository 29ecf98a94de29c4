"""Reference models: what the command line, the tests and the benchmarks use as `zoo:NAME`."""
