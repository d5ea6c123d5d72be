"""From shards of video to a verified store of latents: index, plan, encode, verify, load."""
