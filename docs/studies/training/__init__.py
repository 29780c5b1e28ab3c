"""What a gradient filter does to training: evidence for the default, by `python -m cce_inductor bench --training`."""
