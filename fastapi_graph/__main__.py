"""`python -m fastapi_graph`: the command line."""

from fastapi_graph.cli import main

if __name__ == "__main__":
    main()
