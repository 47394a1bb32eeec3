"""ctrl_diffusion: fine-tuning diffusion models as continuous-time stochastic control."""
