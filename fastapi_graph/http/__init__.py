"""A graph's routes: from an HTTP request, or a websocket, to the graph, and back."""
