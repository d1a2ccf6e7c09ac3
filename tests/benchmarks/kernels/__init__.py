"""A benchmark for every kernel, on a GPU: `python -m tests.benchmarks.kernels.bench_gemm` and so on."""
