"""What is known of an FX graph that Dynamo captured, whatever it computes: `trace` and `rewrite` stand on it."""
