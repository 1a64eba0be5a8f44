"""The judge: perplexity, divergence from the dense model, size and memory, measured on what was written to disk."""
