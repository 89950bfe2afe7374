"""What only a machine with an NVIDIA GPU can prove: `make gpu-check`."""
