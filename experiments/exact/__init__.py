"""Every algorithm on problems whose optimum is known."""
