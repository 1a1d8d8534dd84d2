"""Readers of local files, one kind of file each: `data/records.py` says what they yield."""
