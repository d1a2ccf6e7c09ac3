"""Figures, with the machine they were measured on. They print and assert nothing.

python -m tests.benchmarks.bench_gateway
"""
