"""FX in, FX out: finds linear -> ... -> loss in a graph that Dynamo captured, and puts the fused operator in its place.

`vocabulary` names ops, `trace` follows the logits, `emit` rewrites, `rewrite.rewrite_graph` is the whole pass. Nothing
here knows how the operator is computed.
"""
