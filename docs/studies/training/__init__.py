"""What a gradient filter does to training: evidence for the default, by `python docs/studies/run.py training`."""
