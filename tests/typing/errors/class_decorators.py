from fastapi_graph import deployment


# mypy ignores what a class decorator returns, so it knows neither bind nor options. This is
# why the documentation advises `M = deployment(Model)`.
@deployment
class Model:
    def __init__(self, weight: int) -> None:
        self.weight = weight

    def forward(self, value: int) -> int:
        return value


Model.bind(1)  # error: mypy
Model.options(num_replicas=2)  # error: mypy
Model("heavy")  # error
