"""The ops against the ways people write them today: time, memory, and how near the memory's limit.

``python -m benchmarks --help`` measures; ``python -m benchmarks.report --help`` draws, and writes the
README's part.
"""
