"""The graph on Ray next to what else serves such a graph on several processes."""
