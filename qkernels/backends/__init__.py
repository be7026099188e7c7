"""One module per kernel language: registers its kernels with `qkernels.dispatch`."""
