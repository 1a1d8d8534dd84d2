"""The forms that rows of training data come in, one file each, named as in recipes."""
