"""The dual-branch model: causal branch, diffusion branch, fusion."""
