"""A Stable Diffusion of random weights, in the files of a real one."""
