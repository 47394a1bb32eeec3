"""What each solver costs beside the network evaluations that it makes."""
