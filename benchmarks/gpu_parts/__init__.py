"""The parts of ``benchmarks/gpu.py``, one module each, and what they share."""
