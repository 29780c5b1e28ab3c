"""FX in, FX out: finds linear -> ... -> loss in a graph that Dynamo captured, and puts the fused operator in its place.

`run` is the whole pass: `plan` decides what is done with each head that `trace` has followed, and `emit` puts the
operators in. Nothing here knows how the operator is computed.
"""
