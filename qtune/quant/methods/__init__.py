"""Ways to choose codes: one file each, its name is the word in recipes."""
