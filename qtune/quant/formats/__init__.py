"""Number formats: one file each, its name is the word in recipes."""
