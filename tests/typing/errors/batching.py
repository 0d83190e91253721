from fastapi_graph import batch


@batch
async def lengths(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


class Model:
    @batch
    async def predict(self, texts: list[str]) -> list[float]:
        return [float(len(text)) for text in texts]


batch(max_batch_size="two")  # error
batch(size=2)  # error
batch(5)  # error


async def use(model: Model) -> None:
    await lengths(1)  # error
    await model.predict(1)  # error
    await model.predict()  # error
    text: str = await model.predict("a")  # error
    model.predict.set_max_batch_size("two")  # error
    print(text)
