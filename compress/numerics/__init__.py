"""Pure functions on tensors and numbers: grids, Gram matrices, the OBS loop, refinement, packing, errors."""
