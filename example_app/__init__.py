"""A support desk's service, with two graphs plugged in.

The service has what services have already: routes, a lifespan and API keys (`service.py`,
`auth.py`). What to look at:

- `tutorial.py`: the tutorial's graph, at `/my-dag`.
- `triage.py`: a typed graph. A message is cleaned, two models read it side by side, and what
  they say decides which team gets it, and how soon. It is included with
  `dependencies=[Depends(customer)]`, so it needs an API key like every other route.
- `POST /sentiment` in `service.py`: an endpoint like any other, which has one model of that
  graph injected as a handle.

Start it, and ask:

```
uvicorn example_app:app

curl localhost:8000/my-dag -H 'content-type: application/json' -d '["5", [1, 2], "sum"]'
curl localhost:8000/triage -H 'content-type: application/json' -H 'x-api-key: dev-key' \
    -d '{"text": "I was charged twice. This is NOT acceptable!!"}'
curl localhost:8000/sentiment -H 'content-type: application/json' -H 'x-api-key: dev-key' \
    -d '{"text": "Really great support, thank you"}'
curl localhost:8000/me -H 'x-api-key: dev-key'
curl localhost:8000/health
```

`dev-key` is for development and is valid as long as `EXAMPLE_APP_KEYS` does not name others:
`EXAMPLE_APP_KEYS=alice:key1,bob:key2`. The schemas of both graphs are at `/docs`.

`fastapi-graph check example_app:app` prints the graphs as trees.
"""

from example_app.service import app

__all__ = ["app"]
