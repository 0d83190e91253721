"""What a graph is: deployments, the nodes that bind them, and the built graph. Pure data."""
