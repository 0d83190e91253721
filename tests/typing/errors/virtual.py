from fastapi_graph import deployment, shadow, split


@deployment
def add(left: int) -> int:
    return left + 1


split([add.bind()])  # error
split({add: 1})  # error
split({add.bind(): "much"})  # error
split({add.bind(): 1}, sticky_by=1.5)  # error
shadow(add.bind())  # error
shadow(add.bind(), add)  # error
shadow(add.bind(), add.bind(), 0.5)  # error
