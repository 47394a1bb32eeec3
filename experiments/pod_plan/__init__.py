"""Memory, work and collectives of a run on a slice of accelerators, from its compiled programs."""
