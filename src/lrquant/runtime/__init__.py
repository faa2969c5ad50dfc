"""The machine: processes, memory, files, kernels."""
