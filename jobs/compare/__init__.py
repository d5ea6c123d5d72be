"""Recipes trained and evaluated on the same clips, in one table."""
