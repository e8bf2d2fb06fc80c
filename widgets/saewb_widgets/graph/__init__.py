"""GraphPanel: an attribution graph, its groups of nodes, and interventions that test it."""
