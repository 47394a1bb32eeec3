"""Whether what was learned with one discretisation holds with another."""
