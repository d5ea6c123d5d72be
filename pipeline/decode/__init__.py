"""Frames out of videos and images, in processes that can be killed."""
