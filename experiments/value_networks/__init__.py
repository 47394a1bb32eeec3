"""What a value network should look like, by its error to the exact value."""
