"""`python -m cce_inductor bench`: the head and its loss, by every way there is to compute them."""
