"""What is done with an export after it left: verified, uploaded, played against a server."""
