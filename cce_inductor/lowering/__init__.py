"""Inductor lowerings of the fused operators: `register.py` registers them, `cpu.py` and `cuda*.py` hold them.

Importing this package imports nothing: Inductor is heavy, and ``import torch`` may import us.
"""
