"""The only code that knows ``nn.Module``, hooks and devices: a model's blocks, their layers, the hidden states."""
