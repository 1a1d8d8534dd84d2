"""Exports: the trained model in the forms that other libraries load. One file is one form."""
