"""The compiled CPU kernels, and how they are built and loaded."""
