"""What each layer loses in each format: `qtune sense`."""
