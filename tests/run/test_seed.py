"""The tutorial's complete script, as a program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.processes import Start, free_port

SCRIPT = Path(__file__).with_name("seed_script.py")
SUM = "sum(['(1 * (5 + 1.5))', '(2 * (5 + 1.5))'])"
MAX = "max(['(1 * (1 + 1.0))', '(2 * (1 + 1.0))'])"

DAG_DRIVER = """
    serve_dag = DAGDriver.options(route_prefix="/my-dag", num_replicas=2).bind(
        dag, http_adapter=json_request
    )
"""
OWN_DRIVER = """
    serve_dag = MyDAGDriver.bind(dag)
"""
OWN_CLASS = '''
import starlette.requests


@serve.deployment(route_prefix="/my-dag")
class MyDAGDriver:
    def __init__(self, dag_handle):
        self.dag_handle = dag_handle

    async def predict(self, inp):
        """Perform inference directly without HTTP."""
        return await self.dag_handle.remote(inp)

    async def __call__(self, request: starlette.requests.Request):
        """HTTP endpoint of the DAG."""
        input_data = await request.json()
        return await self.predict(input_data)


# DAG building
'''


def with_own_driver(source: str) -> str:
    assert DAG_DRIVER in source
    return source.replace(DAG_DRIVER, OWN_DRIVER).replace("\n# DAG building\n", OWN_CLASS)


@pytest.mark.parametrize("own_driver", [False, True])
def test_seed_script(start: Start, tmp_path: Path, own_driver: bool) -> None:
    source = SCRIPT.read_text("utf-8")
    script = tmp_path / "example.py"
    script.write_text(with_own_driver(source) if own_driver else source)
    program = start(script, free_port())
    assert program.wait() == 0, program.output
    program.assert_gone()

    lines = program.output.splitlines()
    # Over HTTP the result is JSON, so a string has quotes.
    assert [line.strip('"') for line in lines[::2]] == [SUM, SUM, MAX, MAX]
    spent = [float(s) for s in re.findall(r"Time spent: ([\d.]+) secs\.", program.output)]
    assert len(spent) == 4
    assert len(lines) == 8, program.output
    # One after the other, the nodes would take 0.85 s.
    assert all(0.45 <= seconds < 0.75 for seconds in spent), spent
