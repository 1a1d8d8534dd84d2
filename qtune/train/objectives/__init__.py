"""What is optimized: one file each."""
