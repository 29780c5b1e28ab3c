"""`python -m cce_inductor demo`: one model, one text, trained with and without cce_inductor."""
