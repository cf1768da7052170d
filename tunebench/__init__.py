"""TuneBench: benchmark and autotune LLM kernels across hardware backends on Apache TVM."""

__version__ = "0.1.0"
