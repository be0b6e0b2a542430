"""Semantic operators: schema, reference, fake, autograd and FLOP formula of each."""
