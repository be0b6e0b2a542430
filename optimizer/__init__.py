"""fxpress: a compiler for trained PyTorch models."""
