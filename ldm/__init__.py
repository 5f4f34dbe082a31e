"""Parameter-efficient tuning of latent diffusion models: small adapters at named positions of a frozen UNet."""
