from typing import assert_type

from fastapi_graph.errors import BackPressureError, GraphDefinitionError, GraphError, InputError

assert_type(InputError("no key", path=("a", 0)).path, tuple[str | int, ...])
assert_type(BackPressureError("full").retry_after_s, float)

root: GraphError = InputError("no key")
value_error: ValueError = GraphDefinitionError("wrong")
