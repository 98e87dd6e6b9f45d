"""The CUDA kernels without a GPU: devices that stand in for one, launches, and NVRTC."""
