"""Training of an autoencoder, or of a prior over latents, here or on Ray."""
