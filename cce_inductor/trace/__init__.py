"""Follows logits through a graph: which uses of them are functions of row statistics, and why others are not."""
