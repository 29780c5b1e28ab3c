"""What the demo and the benchmark share: child processes, meters of time and memory, a model and a text to train on."""
