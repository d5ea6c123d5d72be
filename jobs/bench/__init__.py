"""The benchmarks: a command each, the processes that it measures, and its report."""
