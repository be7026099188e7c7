"""Mutations: lines of code to break, each with the tests that must notice; a file for each part."""

from __future__ import annotations

from . import checkpoints, cuda, kernels, quantizers

#: (mutations, tests): a mutation is (file, what it says, what it says instead)
SUITES = (*kernels.SUITES, *cuda.SUITES, *checkpoints.SUITES, *quantizers.SUITES)
