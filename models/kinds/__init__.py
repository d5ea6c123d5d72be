"""The kinds of autoencoder, one short file each: what is built, and what it learns from."""
