"""Speed against a hand-written scan and against PyTorch, on the same networks."""
