"""Inductor lowerings of the fused operators: `register.py` registers them, one file per device family holds them.

Importing this package imports nothing: Inductor is heavy, and ``import torch`` may import us.
"""
