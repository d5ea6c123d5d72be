"""What a trained autoencoder lets you do beside encoding: sample, interpolate, bound the likelihood."""
