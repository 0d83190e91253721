from fastapi_graph.errors import BackPressureError, GraphError

BackPressureError("full", retry_after_s="soon")  # error
timeout: TimeoutError = GraphError("not one")  # error
